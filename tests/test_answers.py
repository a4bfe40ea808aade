"""Answers are data: any of them ends in a valid project or in a clear refusal."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter
from cookiecutter.utils import create_env_with_context
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
GOOD = {"project_name": "P", "project_slug": "p", "description": "", "author_name": "A", "license": "MIT"}
GOOD |= {"task": "language_model", "ci": "none"}

ODD_TEXTS = [
    'It\'s "quoted" \'\'\'thrice\'\'\' """and more"""',
    "back\\slash \\n \\u0041 \\",
    "emoji 👩\u200d💻 🚀",
    "Детектор кошек",
    "日本語のプロジェクト",
    "שלום עולם",
    "مشروع",
    "$(touch hacked) `touch hacked`; rm -rf / && echo $HOME | cat > x",
    "] [tool] = # comment {a = 1}",
    "<b>&amp;</b> *_markdown_* [link](x)",
    "# } %} }} #}",
    "1e400",
    "null",
    "a" * 100,
]
BAD_TEXTS = [
    "two\nlines",
    "a\tb",
    "\x1b[31mred",
    "a\x00b",
    "DEL \x7f",
    "next\x85line",
    "a\u2028b",
    "\u202egpj",
]
ODD_SLUGS = ["a", "My_Project.2", "123_class", "a--b", "x" * 64]
BAD_SLUGS = [
    "",
    " ",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    "/abs",
    "C:",
    "-a",
    "a-",
    "_a",
    "a b",
    "a\n",
    "é",
    "x" * 65,
]
BAD_SLUGS += ["con", "NUL", "com1.txt", "torch", "PyTest", "$(x)", "a;b", '"', "'", "*", "~", "%PATH%"]


@pytest.fixture(scope="module")
def hook(load):
    return load("hooks/pre_gen_project.py")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_arrives_unchanged(text, generate, tmp_path):
    project = generate(tmp_path, project_name=text, description=text, author_name=text)
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["name"] == project.name
    assert metadata["description"] == text
    assert metadata["authors"] == [{"name": text}]
    assert (project / "README.md").read_text(encoding="utf-8").startswith(f"# {text}\n\n{text}\n")
    assert f"(c) {text}\n" in (project / "LICENSE").read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("text", BAD_TEXTS)
@pytest.mark.parametrize("key", ["project_name", "description", "author_name"])
def test_bad_text_is_refused_and_leaves_nothing(key, text, generate, tmp_path, capfd):
    answers = {"project_slug": "p", key: text}
    with pytest.raises(FailedHookException):
        generate(tmp_path, **answers)
    assert list(tmp_path.iterdir()) == []
    error = capfd.readouterr().err.splitlines()
    assert error[0].startswith(f"error: {key} is {text!r}: ") and "allowed" in error[0]
    assert len(error) == 2 and "project_slug=p" in error[1] and "cookiecutter " in error[1]


@pytest.mark.parametrize("slug", ODD_SLUGS)
def test_odd_slugs_are_allowed(slug, generate, tmp_path):
    assert generate(tmp_path, project_slug=slug).name == slug


@pytest.mark.parametrize("slug", BAD_SLUGS)
def test_bad_slugs_are_refused_and_leave_nothing(slug, generate, tmp_path, capfd):
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(FailedHookException):
        generate(folder, project_slug=slug)
    assert list(tmp_path.iterdir()) == []
    assert f"error: project_slug is {slug!r}: " in capfd.readouterr().err


def test_all_faults_are_told_at_once(hook):
    lines = hook.find_faults(
        GOOD
        | {
            "project_name": " ",
            "project_slug": "..",
            "description": "x" * 301,
            "author_name": "",
            "license": "MIT",
        }
    )
    questions = ["project_name", "project_slug", "description", "author_name"]
    assert [line.split()[1] for line in lines[:-1]] == questions
    assert "license=MIT" in lines[-1]


@pytest.mark.parametrize("slug", [*BAD_SLUGS, "é" * 99, "x" * 999, "a/../b"])
def test_a_refused_slug_comes_back_corrected_in_a_command_to_paste(slug, hook):
    *_, last = hook.find_faults(GOOD | {"project_slug": slug, "_template": "some where/it"})
    words = shlex.split(last.split(": ", 1)[1])
    assert words[:3] == ["cookiecutter", "some where/it", "--no-input"]
    answers = dict(word.split("=", 1) for word in words[3:])
    assert answers.keys() == GOOD.keys() and hook.find_faults(answers) == []


@settings(deadline=None)
@given(st.fixed_dictionaries({key: st.text(max_size=400) for key in list(GOOD)[:4]}))
def test_any_answers_are_good_or_come_back_corrected(hook, answers):
    lines = hook.find_faults(GOOD | answers)
    if lines:
        words = shlex.split(lines[-1].split(": ", 1)[1])[3:]
        assert hook.find_faults(dict(word.split("=", 1) for word in words)) == []


def test_command_line_refusal_is_clear(template, user_config, tmp_path):
    options = ["--no-input", "--config-file", str(user_config), "--output-dir", str(tmp_path / "out")]
    command = [
        sys.executable,
        "-m",
        "cookiecutter",
        *options,
        str(template),
        "project_slug=a/b",
        "author_name= ",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_replayed_answers_are_checked_by_the_hook(template, user_config, tmp_path, capfd):
    replay = tmp_path / "replay.json"
    answers = {key: value for key, value in QUESTIONS.items() if key.startswith("_")} | GOOD
    replay.write_text(json.dumps({"cookiecutter": answers | {"project_slug": "con"}}), encoding="utf-8")
    with pytest.raises(FailedHookException):
        cookiecutter(str(template), replay=str(replay), output_dir=str(tmp_path), config_file=str(user_config))
    assert "error: project_slug is 'con': " in capfd.readouterr().err
    assert not (tmp_path / "con").exists()


def test_a_typed_answer_is_never_run_as_jinja(template, user_config, tmp_path):
    typed = ["{{ 7 * 7 }}", "", "{% include 'x' %} {{ cookiecutter }} {#", '"""', "3", "2", "2"]
    options = ["--config-file", str(user_config), "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "cookiecutter", *options, str(template)]
    environment = os.environ | {"PYTHONUTF8": "1"}
    result = subprocess.run(command, input="\n".join(typed) + "\n", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    metadata = tomllib.loads((tmp_path / "7-7" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (metadata["description"], metadata["authors"]) == (typed[2], [{"name": typed[3]}])
    assert metadata["license"] == "BSD-3-Clause"
    assert (tmp_path / "7-7" / "README.md").read_text(encoding="utf-8").startswith("# {{ 7 * 7 }}\n")


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_toml(load, text):
    environment = jinja2.Environment(extensions=[load("local_extensions.py").toml])
    rendered = environment.from_string('x = "{{ text | toml }}"').render(text=text)
    assert tomllib.loads(rendered) == {"x": text}


@settings(deadline=None)
@given(st.text(max_size=100))
def test_the_slug_made_from_any_name_is_valid(hook, name):
    environment = create_env_with_context({"cookiecutter": {}})
    slug = environment.from_string(QUESTIONS["project_slug"]).render(cookiecutter={"project_name": name})
    fault = hook.slug_fault(slug)
    assert fault is None or "of that name" in fault or "reserves this name" in fault


@settings(deadline=None)
@given(st.text())
def test_any_answer_reaches_the_hook_unchanged(text):
    answers = GOOD | {"project_name": text}
    line = 'r"""{{ cookiecutter | tojson }}"""'
    rendered = create_env_with_context({"cookiecutter": {}}).from_string(line).render(cookiecutter=answers)
    assert json.loads(eval(rendered)) == answers


def test_every_dependency_is_refused_as_a_name(hook):
    project = tomllib.loads((ROOT / "{{cookiecutter.project_slug}}" / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    assert {name.split(">=")[0].split("[")[0] for name in listed} == hook.DEPENDENCIES

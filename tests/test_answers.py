"""Answers are data: any of them ends in a valid project or in a clear refusal."""

from __future__ import annotations

import html
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter
from cookiecutter.utils import create_env_with_context
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

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
    "<!-- hidden",
    "& {braces} 100 % $5 ~^",
    "```",
    "# heading",
    "1. one",
    "---",
    "C #",
    "_a_ My_Project __b__ |c| ~~d~~ ![e]",
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


# Any text, that of a letter and of ten thousand.
ANSWERS = st.text(max_size=400) | st.sampled_from([*ODD_TEXTS, *BAD_TEXTS, "x" * 10_000, "é/" * 5_000])


# Answers that are allowed, most of them.
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=100)
LIKELY = {key: PRINTABLE for key in ("project_name", "description", "author_name")}
LIKELY["project_slug"] = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,60}[A-Za-z0-9])?", fullmatch=True)


@pytest.fixture(scope="module")
def hook(load):
    return load("hooks/pre_gen_project.py")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_looks_on_a_page_as_it_was_given(text, generate, tmp_path):
    project = generate(tmp_path, project_name=text, description=text, project_slug="p")
    tokens = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse((project / "README.md").read_text("utf-8"))
    )
    assert [token.type for token in tokens[:6]] == [
        *("heading_open", "inline", "heading_close", "paragraph_open", "inline", "paragraph_close"),
    ]
    for inline in (tokens[1], tokens[4]):
        assert {part.type for part in inline.children} <= {"text", "text_special"}
        assert "".join(part.content for part in inline.children) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_arrives_unchanged(text, generate, tmp_path):
    project = generate(tmp_path, project_name=text, description=text, author_name=text)
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["name"] == project.name
    assert metadata["description"] == text
    assert metadata["authors"] == [{"name": text}]
    # On the page that is made of it, it looks as it was given.
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert "<" not in readme[: readme.index("## Start")]
    assert html.unescape(readme).startswith(f"# {text}\n\n{text}\n")
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
    assert len(error) == 2 and '"project_slug": "p"' in error[1]


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\u3164 \u2800", "\U000e0041"])
@pytest.mark.parametrize("key", ["project_name", "author_name"])
def test_a_name_that_nobody_sees_is_refused(key, text, hook):
    first, last = hook.find_faults(GOOD | {key: text})
    assert first == f"error: {key} is {text!r}: at least one visible character is needed."
    assert hook.find_faults(json.loads(last.split(": ", 1)[1])) == []


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
    assert '"license": "MIT"' in lines[-1]


@pytest.mark.parametrize("slug", [*BAD_SLUGS, "é" * 99, "x" * 999, "a/../b"])
def test_a_refused_slug_comes_back_corrected_in_a_command_to_paste(slug, hook):
    command = ["cookiecutter", "some where/it"]
    *_, last = hook.find_faults(GOOD | {"project_slug": slug}, command)
    words = shlex.split(last.split(": ", 1)[1])
    assert words[:2] == command
    answers = dict(word.split("=", 1) for word in words[2:])
    assert answers.keys() == GOOD.keys() and hook.find_faults(answers) == []


@settings(deadline=None)
@given(st.fixed_dictionaries({key: ANSWERS for key in list(GOOD)[:4]}))
def test_any_answers_are_good_or_come_back_corrected(hook, answers):
    lines = hook.find_faults(GOOD | answers)
    if lines:
        assert hook.find_faults(json.loads(lines[-1].split(": ", 1)[1])) == []
        assert all(len(line) < 700 for line in lines[:-1])


def check_any_answers(hook, tool, generate, folder, capfd, answers):
    """Generate a project, or be refused; returns whether there was one, and it is valid."""
    # What a check that failed has left would fail those after it.
    shutil.rmtree(folder, ignore_errors=True)
    # Cookiecutter renders answers that are not typed, and Jinja knows one way to end a line.
    given_to_it = {key: text.replace("{", "{{ '{' }}") for key, text in (GOOD | answers).items()}
    answers = {key: re.sub("\r\n?", "\n", text) for key, text in answers.items()}
    faults = hook.find_faults(GOOD | answers)
    if faults:
        with pytest.raises(FailedHookException):
            generate(folder, **given_to_it)
        assert not folder.exists() and capfd.readouterr().err.splitlines()[:-1] == faults[:-1]
        return False
    project = generate(folder, **given_to_it)
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (metadata["description"], metadata["authors"][0]["name"]) == (answers["description"], answers["author_name"])
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert html.unescape(readme).startswith(f"# {answers['project_name']}\n\n{answers['description']}\n")
    # A fence ends at a line of its own.
    [entry] = re.findall(r"^```bibtex\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert entry.count("{") == entry.count("}") == 3 + 2 * entry.count("{}")
    assert project.name == answers["project_slug"] and tool.unparsed(project) == []
    # An answer may look like Jinja itself.
    alike = any(mark in text for text in answers.values() for mark in ("{{", "{%", "cookiecutter."))
    assert alike or tool.unrendered(project) == []
    return True


def test_any_answers_give_a_valid_project_or_a_refusal(hook, load, generate, tmp_path, capfd):
    tool, accepted = load("tools/combinations.py"), []

    @settings(deadline=None, max_examples=25)
    @given(st.fixed_dictionaries(LIKELY) | st.fixed_dictionaries({key: ANSWERS for key in LIKELY}))
    @example(dict.fromkeys(LIKELY, "{{ cookiecutter.x }} {% raw %}") | {"project_slug": "a.b_c"})
    @example(dict.fromkeys(LIKELY, "a\rb\r\nc"))
    @example({"project_name": "0", "project_slug": "0", "description": "<`^", "author_name": "```"})
    def check(answers):
        accepted.append(check_any_answers(hook, tool, generate, tmp_path / "any", capfd, answers))

    check()
    # More than the one example that is given above.
    assert accepted.count(True) > 1 and accepted.count(False) > 1


def test_the_choices_are_those_of_the_questions(hook):
    assert hook.CHOICES == {
        key: answers for key, answers in QUESTIONS.items() if isinstance(answers, list) and key[0] != "_"
    }


def paste(told, **options):
    """Run the command that a refusal says, as it stands."""
    pasted = re.search(r"with answers that can: (.*)", told)[1]
    again = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, **options)
    assert again.returncode == 0, (pasted, again.stderr)
    return pasted


SCRIPTS = Path(sys.executable).parent
OTHER_PATH = os.pathsep.join(path for path in os.get_exec_path() if Path(path) != SCRIPTS)
OURS_FIRST = f"{SCRIPTS}{os.pathsep}{OTHER_PATH}"


@pytest.mark.parametrize(
    ("start", "path", "said"),
    [
        ([sys.executable, "-m", "cookiecutter"], OURS_FIRST, [Path(sys.executable).name, "-m", "cookiecutter"]),
        ([sys.executable, "-m", "cookiecutter"], OTHER_PATH, [sys.executable, "-m", "cookiecutter"]),
        ([str(SCRIPTS / "cookiecutter")], OURS_FIRST, ["cookiecutter"]),
        ([str(SCRIPTS / "cookiecutter")], OTHER_PATH, [str(SCRIPTS / "cookiecutter")]),
    ],
)
def test_command_line_refusal_is_clear(start, path, said, template, user_config, tmp_path):
    # A folder that is named like a question is no answer.
    options = ["--no-input", "--config-file", str(user_config), "--output-dir", "task"]
    command = [*start, *options, str(template), "project_slug=a/b", "author_name= "]
    place = {"cwd": tmp_path, "env": os.environ | {"PATH": path}}
    result = subprocess.run(command, capture_output=True, text=True, **place)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "task").exists()
    # The command that it says works as it stands, and where the first was to.
    assert shlex.split(paste(result.stderr, **place))[: len(said)] == said
    assert (tmp_path / "task" / "a-b" / "main.py").is_file()


@pytest.mark.parametrize("as_module", [True, False])
def test_a_refusal_under_cruft_is_a_command_of_cruft(as_module, template, user_config, tmp_path):
    source = shutil.copytree(template, tmp_path / "the source")
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    start = [sys.executable, "-m", "cruft"] if as_module else [str(SCRIPTS / "cruft")]
    command = [*start, "create", "-y", str(source), "--extra-context", '{"project_slug": "a/b", "ci": "GitLab"}']
    place = {"cwd": tmp_path, "env": os.environ | {"PATH": OURS_FIRST, "COOKIECUTTER_CONFIG": str(user_config)}}
    result = subprocess.run(command, capture_output=True, text=True, **place)
    assert result.returncode == 1 and result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert paste(result.stderr, **place).count("--extra-context") == 1
    assert (tmp_path / "a-b/.gitlab-ci.yml").is_file() and (tmp_path / "a-b/.cruft.json").is_file()


@pytest.mark.parametrize(
    ("key", "answer", "left"),
    [
        *(("project_slug", "con", None), ("project_slug", "../x", None), ("project_slug", "a/b", "a")),
        *(
            ("project_slug", "a/b/c", "a"),
            ("license", "GPL", None),
            ("task", "segmentation", None),
            ("ci", "Gitea", None),
        ),
    ],
)
def test_replayed_answers_are_checked_by_the_hook(key, answer, left, template, user_config, tmp_path, capfd):
    replay = tmp_path / "replay.json"
    answers = {name: value for name, value in QUESTIONS.items() if name.startswith("_")} | GOOD
    replay.write_text(json.dumps({"cookiecutter": answers | {key: answer}}), encoding="utf-8")
    output = tmp_path / "out"
    with pytest.raises(FailedHookException):
        cookiecutter(str(template), replay=str(replay), output_dir=str(output), config_file=str(user_config))
    error = capfd.readouterr().err
    assert f"error: {key} is {answer!r}: " in error and f"cookiecutter --no-input {shlex.quote(str(template))}" in error
    assert f"--output-dir {shlex.quote(str(output))}" in error
    # Cookiecutter removes the last folder of the slug alone; of `../x` nothing is left either.
    assert [*output.iterdir()] == ([output / left] if left else []) and not (tmp_path / "x").exists()
    assert (f"The empty folder {output / (left or 'a')} is left: remove it." in error) == (left is not None)


def write_over(template, user_config, folder, **options):
    """Generate the project `p` where there is something of that name."""
    options = {"no_input": True, "config_file": str(user_config), "overwrite_if_exists": True, **options}
    return cookiecutter(str(template), extra_context={"project_slug": "p"}, output_dir=str(folder), **options)


def test_a_project_that_is_there_is_not_written_over(generate, template, user_config, tmp_path, capfd):
    project = generate(tmp_path, project_slug="p")
    (project / "model" / "standard_net.py").write_text("mine", encoding="utf-8")
    (project / "data" / "own.py").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    for skip in (False, True):
        with pytest.raises(FailedHookException):
            write_over(template, user_config, tmp_path, skip_if_file_exists=skip)
        there = ".github, Makefile, configs, data, engine, main.py, model, pyproject.toml, slurm.sh, tests, utils"
        assert f"has {there} already: they, or files in them, would be" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", [".gitlab-ci.yml", "Makefile", "main.py", "pyproject.toml"])
def test_a_file_that_is_there_is_not_written_over(name, template, user_config, tmp_path, capfd):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(FailedHookException):
        write_over(template, user_config, tmp_path)
    assert f"has {name} already" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "p").iterdir()] == [name]
    assert (tmp_path / "p" / name).read_text(encoding="utf-8") == "mine"


def test_a_repository_that_is_empty_takes_a_project(template, user_config, tmp_path):
    """As made on a server, and cloned."""
    for name in (".git/HEAD", ".gitignore", "README.md", "LICENSE"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("theirs", encoding="utf-8")
    project = Path(write_over(template, user_config, tmp_path))
    assert (project / ".git/HEAD").read_text(encoding="utf-8") == "theirs"
    assert (project / "main.py").is_file() and (project / "README.md").read_text(encoding="utf-8") != "theirs"


def test_the_three_commands_that_come_next_work(template, user_config, tmp_path):
    (tmp_path / "some where").mkdir()
    options = ["--no-input", "--config-file", str(user_config), "--output-dir", "some where"]
    command = shlex.join([sys.executable, "-m", "cookiecutter", *options, str(template)])
    done = subprocess.run(["bash", "-c", f"cd {shlex.quote(str(tmp_path))}; {command}"], capture_output=True, text=True)
    enter, commit, train = [line.split("  # ")[0].strip() for line in done.stdout.splitlines() if line[:2] == "  "]
    who = {f"GIT_{role}_{what}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | who | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    script = f"{enter} && {commit} && {train} --dry-run && git status --short"
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "main.py" in ran.stdout and (tmp_path / "some where/my-project/.git").is_dir()


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
    readme = (tmp_path / "7-7" / "README.md").read_text(encoding="utf-8")
    assert html.unescape(readme).startswith("# {{ 7 * 7 }}\n")


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


def names_of(requirements):
    """Packages that requirements ask for, apart from those of extras."""
    found = [re.match(r"[A-Za-z0-9._-]+", text)[0] for text in requirements if "extra ==" not in text]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def test_every_dependency_is_refused_as_a_name(hook):
    settings = tomllib.loads((ROOT / "{{cookiecutter.project_slug}}" / "pyproject.toml").read_text(encoding="utf-8"))
    extras = [name for names in settings["project"]["optional-dependencies"].values() for name in names]
    asked = names_of([*settings["project"]["dependencies"], *extras, *settings["build-system"]["requires"]])
    assert asked - hook.DEPENDENCIES == set()
    # And those that these ask for, as far as this system and this Python have them.
    installed = {re.sub(r"[-_.]+", "-", found.name).lower() for found in importlib.metadata.distributions()}
    seen = {"pip"}
    while new := (asked & installed) - seen:
        seen |= new
        asked |= {needed for name in new for needed in names_of(importlib.metadata.requires(name) or [])}
    assert {name for name in seen if not name.startswith(("nvidia", "cuda"))} - hook.DEPENDENCIES == set()

"""What a generated project consists of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

TEMPLATE = "{{cookiecutter.project_slug}}"
LICENSES = {
    "MIT": "MIT License",
    "Apache-2.0": "Apache License",
    "BSD-3-Clause": "BSD 3-Clause License",
    "Proprietary": "All rights reserved.",
}


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def git(folder, *arguments):
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_is_small_at_a_glance(generated):
    visible = [path.name for path in generated.iterdir() if not path.name.startswith(".")]
    assert len(visible) <= 12, visible
    assert len(files_below(generated)) <= 128


def test_no_jinja_is_left(generated):
    for name in files_below(generated):
        if name.endswith(".npz"):
            continue
        text = (generated / name).read_text(encoding="utf-8")
        assert "cookiecutter." not in text, name
        if not name.endswith(".py"):  # not rendered, and free to use doubled braces in an f-string
            assert "{{" not in text and "{%" not in text, name


def test_python_and_data_are_copied_byte_for_byte(generated, template):
    copied = [name for name in files_below(generated) if name.endswith((".py", ".npz"))]
    assert "data/digits.npz" in copied
    for name in copied:
        assert (generated / name).read_bytes() == (template / TEMPLATE / name).read_bytes(), name


@pytest.mark.parametrize("place", ["generated", "template"])
def test_toml_and_yaml_parse_in_the_project_and_in_place(place, request):
    folder = request.getfixturevalue(place)
    parsed = []
    for path in folder.rglob("*"):
        if path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))
            parsed.append(path.name)
        elif path.suffix in {".yaml", ".yml"}:
            yaml.safe_load(path.read_text(encoding="utf-8"))
            parsed.append(path.name)
    assert {"pyproject.toml", "ci.yml"} <= set(parsed)


def test_generating_twice_gives_the_same_bytes(generated, generate, tmp_path):
    again = generate(tmp_path)
    assert files_below(again) == files_below(generated)
    for name in files_below(again):
        assert (again / name).read_bytes() == (generated / name).read_bytes(), name


@pytest.mark.parametrize(("choice", "title"), LICENSES.items())
def test_each_license(choice, title, generate, tmp_path):
    project = generate(tmp_path, license=choice, author_name="Ada & Søn")
    text = (project / "LICENSE").read_text(encoding="utf-8")
    assert title in text and "Copyright" in text and "Ada & Søn" in text
    assert sum(other in text for other in LICENSES.values()) == 1
    assert text.strip("\n") + "\n" == text.lstrip("\n"), "one newline at the end"
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["license"].removeprefix("LicenseRef-") == choice


def test_git_ignores_what_runs_leave_behind_and_nothing_else(generated, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(generated, project)
    assert git(project, "init").returncode == 0
    untracked = git(project, "ls-files", "--others", "--exclude-standard").stdout.split("\n")
    assert {name for name in untracked if name} == files_below(generated)

    kept = [
        "data/my_data.py",
        "data/my_data.npz",
        "model/my_net.py",
        "utils/logs.py",
        "configs/mine.yaml",
        "uv.lock",
    ]
    assert git(project, "check-ignore", *kept).stdout == ""
    left_behind = [
        "logs/standard_net/version_0/metrics.csv",
        "datasets/x.npz",
        ".venv/x",
        "data/__pycache__/x.pyc",
    ]
    assert git(project, "check-ignore", *left_behind).stdout.split() == left_behind


def test_generation_and_its_hooks_use_no_network(template, user_config, tmp_path):
    # Python runs sitecustomize at every start, so this reaches the hooks, which are processes of their own.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def refuse(event, arguments):\n"
        "    if event.startswith('socket.'):\n"
        "        raise RuntimeError(f'{event} is not allowed')\n"
        "sys.addaudithook(refuse)\n"
        "print(sys.argv, file=open(os.environ['STARTS'], 'a'))\n",
        encoding="utf-8",
    )
    starts = tmp_path / "starts.txt"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "STARTS": str(starts)}

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    blocked = run("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert "is not allowed" in blocked.stderr
    starts.unlink()
    options = ["--no-input", "--config-file", str(user_config), "--output-dir", str(tmp_path / "out")]
    result = run("-m", "cookiecutter", str(template), *options)
    assert result.returncode == 0, result.stderr
    assert len(starts.read_text(encoding="utf-8").splitlines()) == 3, "cookiecutter and two hooks"
    assert "make train" in result.stdout


def test_hooks_need_the_standard_library_only(template, generated):
    for hook in sorted((template / "hooks").glob("*.py")):
        isolated = subprocess.run([sys.executable, "-S", "-c", f"import runpy; runpy.run_path({str(hook)!r})"])
        assert isolated.returncode == 0, hook.name

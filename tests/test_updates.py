"""A project that cruft has made or linked takes a new version of the template, and keeps what its user filled in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TEMPLATE = "{{cookiecutter.project_slug}}"
FILLED_IN = ("model/standard_net.py", "data/standard_data.py")


@pytest.fixture
def execute(tmp_path: Path, user_config: Path) -> Callable[..., str]:
    """Runs a command of git, cookiecutter or cruft; without settings of the user's, as in a fresh home."""
    home = tmp_path / "home"
    home.mkdir()
    who = {f"GIT_{role}_{what}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **who, "HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull}
    environment |= {"COOKIECUTTER_CONFIG": str(user_config), "GIT_CONFIG_SYSTEM": os.devnull}

    def execute(folder: Path, *words: str, typed: str | None = None) -> str:
        command = [sys.executable, "-m", *words] if words[0] in ("cruft", "cookiecutter") else list(words)
        done = subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return execute


def commit(execute: Callable[..., str], folder: Path, message: str) -> None:
    execute(folder, "git", "add", "--all")
    execute(folder, "git", "commit", "--quiet", "--message", message)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def source(template: Path, execute: Callable[..., str], tmp_path: Path) -> Path:
    """The template as a repository, of one version."""
    source = Path(shutil.copytree(template, tmp_path / "source"))
    execute(source, "git", "init", "--quiet", "--initial-branch", "main")
    commit(execute, source, "First version")
    return source


def fill_in(execute: Callable[..., str], project: Path) -> dict[str, bytes]:
    """Make a repository of a new project, with work of its user's; returns the files of theirs."""
    execute(project, "git", "init", "--quiet", "--initial-branch", "main")
    for name in FILLED_IN:
        replace(project / name, "FILL IN", "FILLED IN")
    shutil.copy(project / "model/standard_net.py", project / "model/my_net.py")
    commit(execute, project, "My own")
    return {name: (project / name).read_bytes() for name in (*FILLED_IN, "model/my_net.py")}


def publish(execute: Callable[..., str], source: Path) -> None:
    """A new version: of the engine, of files that hold answers, of one that moves, also of the very lines that the user
    has filled in; a file more, and one less.
    """
    files = source / TEMPLATE
    for name in FILLED_IN:
        for changed in (files / name, files / "tasks/tabular_regression" / name, files / "tasks/language_model" / name):
            replace(changed, "FILL IN", "FILL THIS IN")
    replace(files / "engine/version.py", 'TEMPLATE = "', 'TEMPLATE = "9.')
    replace(files / "engine/loops.py", "from __future__", "# A better loop.\nfrom __future__")
    replace(files / "README.md", "## Report\n", "## A new section\n\nNews.\n\n## Report\n")
    replace(files / "pyproject.toml", '"rich>=13.9"', '"rich>=13.99"')
    replace(files / "tasks/tabular_regression/data/diabetes.md", "ten measurements", "10 measurements")
    (files / "utils/newer.py").write_text('"""New."""\n', encoding="utf-8")
    (files / "utils/search.py").unlink()
    commit(execute, source, "Second version")


def check_merged(execute: Callable[..., str], project: Path, mine: dict[str, bytes]) -> None:
    """All of the new version has arrived, and nothing of the user's is lost."""
    assert [*project.rglob("*.rej"), *project.rglob("*.orig")] == []
    assert {name: (project / name).read_bytes() for name in mine} == mine
    assert "9." in (project / "engine/version.py").read_text(encoding="utf-8")
    assert "# A better loop." in (project / "engine/loops.py").read_text(encoding="utf-8")
    assert "## A new section" in (project / "README.md").read_text(encoding="utf-8")
    assert '"rich>=13.99"' in (project / "pyproject.toml").read_text(encoding="utf-8")
    assert (project / "utils/newer.py").is_file() and not (project / "utils/search.py").exists()
    assert not (project / "tasks").exists() and not (project / ".github").exists()
    execute(project, "cruft", "check")


@pytest.mark.parametrize("task", ["image_classification", "tabular_regression", "language_model"])
def test_an_update_merges(task: str, source: Path, execute: Callable[..., str], tmp_path: Path) -> None:
    answers = f'{{"project_slug": "mine", "task": "{task}", "ci": "GitLab"}}'
    execute(tmp_path, "cruft", "create", str(source), "--no-input", "--extra-context", answers)
    project = tmp_path / "mine"
    mine = fill_in(execute, project)
    publish(execute, source)
    execute(project, "cruft", "update", "--skip-apply-ask")
    check_merged(execute, project, mine)
    if task == "tabular_regression":
        assert "10 measurements" in (project / "data/diabetes.md").read_text(encoding="utf-8")


def test_a_project_made_without_cruft_is_linked_and_updated(
    source: Path, execute: Callable[..., str], tmp_path: Path
) -> None:
    """Linked as docs/how-to.md says, when the newer version is there already: all of it is to arrive."""
    answers = {"project_name": "Mine", "project_slug": "mine", "task": "language_model", "ci": "GitLab"}
    execute(tmp_path, "cookiecutter", "--no-input", str(source), *map("=".join, answers.items()))
    project, first = tmp_path / "mine", execute(source, "git", "rev-parse", "HEAD").strip()
    mine = fill_in(execute, project)
    publish(execute, source)
    # Enter for each of the seven questions, whose defaults are the answers here; then the commit.
    typed = "\n" * 7 + f"{first}\n"
    told = execute(project, "cruft", "link", str(source), "--extra-context", json.dumps(answers), typed=typed)
    assert "Link to template at commit" in told
    linked = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert (linked["commit"], linked["checkout"]) == (first, None)
    assert {name: linked["context"]["cookiecutter"][name] for name in answers} == answers
    commit(execute, project, "Linked")
    execute(project, "cruft", "update", "--skip-apply-ask")
    check_merged(execute, project, mine)


def test_versions_are_told_and_agree(template: Path, generated: Path) -> None:
    told = subprocess.run([sys.executable, "-m", "engine"], cwd=generated, capture_output=True, text=True, check=True)
    found = re.fullmatch(r"engine (\d+\.\d+\.\d+), cookiecutter-torch-trainer (\d+\.\d+\.\d+)\n", told.stdout)
    assert found is not None, told
    own = re.search(r'^version = "(.*)"', (template / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert own is not None and found[2] == own[1]
    changelog = (template / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(found[2])} .*engine {re.escape(found[1])}", changelog, re.MULTILINE)

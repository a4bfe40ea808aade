"""A generated project passes its own checks, and its README tells the truth about it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(generated, tmp_path_factory):
    """A generated project that may be written to, in a path that needs quoting."""
    return Path(shutil.copytree(generated, tmp_path_factory.mktemp("a folder") / "проект"))


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy", "pytest"])
def test_it_passes_its_own_checks(project, command):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_template_and_its_tools_pass_the_same_checks(template):
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        result = subprocess.run([sys.executable, "-m", *command.split()], cwd=template, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def tree_of(readme):
    """Return the paths that the tree in a README names, from its indentation."""
    block = re.search(r"## What is where\n\n```\n(.*?)```", readme, flags=re.DOTALL)[1]
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            paths.append(folder + name)
        else:
            folder = name
            paths.append(name)
    return paths


def test_the_tree_in_the_readme_names_only_what_exists(generated_of_task):
    project = generated_of_task
    paths = tree_of((project / "README.md").read_text(encoding="utf-8"))
    assert len(paths) > 10
    assert [path for path in paths if not (project / path).exists()] == []


def test_the_tree_in_the_readme_names_every_folder(generated_of_task):
    project = generated_of_task
    named = tree_of((project / "README.md").read_text(encoding="utf-8"))
    visible = [path.name for path in project.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
    assert {f"{name}/" for name in visible} - {"logs/"} <= set(named)


def test_the_make_targets_in_the_readme_exist(generated_of_task):
    project = generated_of_task
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (train|test|lint)", (project / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_in_the_readme_lead_to_files(generated_of_task):
    project = generated_of_task
    for target in re.findall(r"\]\(([^)]+)\)", (project / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (project / target).is_file(), target

"""A generated project under every Python of this machine that it claims to run on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pythons() -> dict[str, str]:
    """The newest executable of each minor version that is claimed, newest first: of this, the PATH and pyenv."""
    settings = tomllib.loads((ROOT / "{{cookiecutter.project_slug}}/pyproject.toml").read_text(encoding="utf-8"))
    oldest = int(settings["project"]["requires-python"].removeprefix(">=3."))
    own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3")
    listed = [shutil.which(f"python3.{minor}") for minor in range(oldest, oldest + 10)]
    found: list[tuple[tuple[int, int], str]] = []
    for python in [sys.executable, *filter(None, listed), *map(str, own)]:
        told = subprocess.run([python, "--version"], capture_output=True, text=True)
        version = re.match(r"Python 3\.(\d+)\.(\d+)", told.stdout)
        if told.returncode == 0 and version is not None and int(version[1]) >= oldest:
            found.append(((int(version[1]), int(version[2])), python))
    newest: dict[str, str] = {}
    for (minor, _), python in sorted(found, key=lambda pair: pair[0], reverse=True):
        newest.setdefault(f"3.{minor}", python)
    return newest


def test_this_python_is_among_them() -> None:
    assert f"3.{sys.version_info.minor}" in pythons()


@pytest.mark.long
@pytest.mark.parametrize("version", pythons())
def test_a_project_passes_its_tests_and_trains(version: str, generated: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(generated, tmp_path / "project"))
    # Kept between runs: it takes minutes to make.
    environment = ROOT / "build" / "pythons" / version
    python = str(environment / "bin/python")

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    if not Path(python).exists():
        run(pythons()[version], "-m", "venv", str(environment))
    run(python, "-m", "pip", "install", "--quiet", f"{project}[dev]")
    run(python, "-m", "pytest", "-q")
    run(python, "main.py", "--max_epochs", "2", "--enable_progress_bar", "false")
    assert (project / "logs/standard_net/version_0/report/report.html").is_file()

"""The pictures of terminals show what a terminal shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "screenshot.py"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """The tool's result for a script that prints, redraws a line, uses colours and fails."""
    path = tmp_path_factory.mktemp("screenshot") / "new folder" / "picture.svg"
    script = (
        "import os, sys\n"
        "print('columns', os.get_terminal_size().columns, sys.stdout.isatty())\n"
        "for line in range(100): print(f'line{line}')\n"
        "print('first\\rsecond')\n"
        "print('\\x1b[1;38;2;1;2;3mbold\\x1b[0m')\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, str(TOOL), "--columns", "72", "--title", "a < b", str(path), "--"]
    result = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    return result, path.read_text(encoding="utf-8").replace("&#160;", " ")


def test_it_returns_and_prints_the_exit_status(picture):
    result, _ = picture
    assert result.returncode == 3
    assert result.stdout.endswith("exit status: 3\n")


def test_it_shows_the_final_state_of_all_lines(picture):
    _, svg = picture
    assert "columns 72 True" in svg
    assert ">line0<" in svg and ">line99<" in svg
    assert ">second<" in svg and "first" not in svg


def test_it_keeps_styles_and_loads_nothing(picture):
    _, svg = picture
    assert "fill: #010203;font-weight: bold" in svg
    assert "a &lt; b" in svg
    assert "url(http" not in svg and "@font-face" not in svg

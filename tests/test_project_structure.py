"""The code of a project as text: how long things are, and what `--help` has to import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"
FILES = sorted(file for file in PROJECT.rglob("*.py") if "engine" not in file.parts)
LIMITS = {"main.py": 120, "data/data_interface.py": 200, "model/model_interface.py": 200}

# What `python main.py --help` may import beside torch, torchvision, torchmetrics and what these import.
OURS = {"main", "engine", "data", "model", "utils"}
SMALL = {"jsonargparse", "docstring_parser", "yaml", "PIL"}


def length(node: ast.AST) -> int:
    """Lines of a function, from the first of its body."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    return node.end_lineno - node.body[0].lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PROJECT).as_posix())
def test_no_file_and_no_function_needs_a_scroll(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    name = file.relative_to(PROJECT).as_posix()
    assert len(text.splitlines()) <= LIMITS.get(name, 400)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert [node.name for node in functions if length(node) > 50] == []


def test_help_imports_little(tmp_path: Path) -> None:
    script = (
        "import json, sys, contextlib, io\n"
        "import torch\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main.main(['--help'])\n"
        "new = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(json.dumps(sorted(new)))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    imported = {name.removeprefix("_") for name in json.loads(out) if "cython" not in name}
    assert imported >= OURS
    # What jsonargparse imports where it is installed, and a module that torch.distributed makes.
    assert imported - OURS - SMALL - {"typeshed_client", "attr", "attrs", "remote_module_non_scriptable"} == set()

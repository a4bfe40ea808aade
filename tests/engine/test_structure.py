"""The engine as text: who imports whom, and how long things are; and that dispatch is typed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import engine
import pytest

ROOT = Path(engine.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up; a module imports at run time from lower layers only, so there are no cycles.
LAYERS = [
    {"exceptions", "distributed", "hooks", "untrusted", "older_names"},
    {"seed", "callback", "checkpoint", "meters", "precision", "signals", "strategy", "utilities", "faults", "export"},
    {"metrics", "hparams", "samples", "older", "callbacks.monitor"},
    {"module", "datamodule", "optim", "reading", "loggers.logger"},
    {"data", "resume", "hook_checks", "profilers", "loggers.csv_logs", "loggers.tensorboard"},
    {"evaluation", "loggers"},
    {"optimization"},
    {"loops"},
    {
        *("callbacks.checkpoint", "callbacks.early_stopping", "callbacks.gradient_accumulation_scheduler"),
        *("callbacks.lambda_function", "callbacks.learning_rate_monitor", "callbacks.prediction_writer"),
        *("callbacks.progress", "callbacks.terminal", "callbacks.timer", "callbacks.weight_averaging"),
    },
    {"callbacks.model_checkpoint", "callbacks.learning_rate_finder", "callbacks.stochastic_weight_avg"},
    {"callbacks.checkpoint_search"},
    {"callbacks"},
    {"arguments", "trainer_properties"},
    {"lifecycle"},
    {"trainer"},
    {""},
]


def name_of(path: Path) -> str:
    """Dotted name below `engine`; empty for the package itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def runtime_imports(tree: ast.AST) -> set[str]:
    """Modules of the engine that a file imports when it runs, so not under `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            # `from engine import data` imports a module, `from engine.data import x` a name in it.
            found |= {f"engine.{alias.name}" for alias in node.names} if node.module == "engine" else {str(node.module)}
        found |= {f"engine.{name}" for name in runtime_imports(node)}
    return {name.removeprefix("engine.") for name in found if name.split(".")[0] == "engine"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert name_of(path) in level, "a new module: give it a layer"
    imported = runtime_imports(ast.parse(path.read_text(encoding="utf-8")))
    assert imported <= set(level)
    assert [name for name in sorted(imported) if level[name] >= level[name_of(path)]] == []


def test_every_layer_is_in_use() -> None:
    assert set().union(*LAYERS) == {name_of(path) for path in FILES}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert lines(path) <= 400


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_longer_than_50_lines(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    # From the first line of the body: the Trainer's arguments, one a line, are a list to look things up in.
    long = {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.body[0].lineno + 1 for node in functions}
    assert {name: length for name, length in long.items() if length > 50} == {}


def test_the_core_has_at_most_4200_lines_and_the_rest_1200() -> None:
    extra = [path for path in FILES if name_of(path).startswith("callbacks") or name_of(path) == "loggers"]
    core = [path for path in FILES if path not in extra]
    print(f"\nlines: core {sum(map(lines, core))}, callbacks and loggers {sum(map(lines, extra))}")
    assert sum(map(lines, core)) <= 4200
    assert sum(map(lines, extra)) <= 1200


CALLS = """
from __future__ import annotations

from torch import Tensor

from engine import Callback, Trainer


def run(trainer: Trainer, batch: Tensor) -> None:
    trainer.call(Callback.on_train_batch_start, batch, 3)
    trainer.call(Callback.on_train_batch_start, batch)
    trainer.call(Callback.on_train_batch_start, batch, "3")
    trainer.call(Callback.on_train_batch_start, batch, 3, 4)
    trainer.call(Callback.on_train_batch_strat, batch, 3)
"""


def test_a_wrong_argument_of_a_hook_is_a_type_error(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    cache = os.environ.get("MYPY_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, "--config-file", os.devnull, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT.parent)})
    errors = [(int(line), code) for line, code in re.findall(r"calls\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)]
    right = CALLS.splitlines().index("    trainer.call(Callback.on_train_batch_start, batch, 3)") + 1
    assert errors == [
        *((right + 1, "call-arg"), (right + 2, "arg-type"), (right + 3, "call-arg"), (right + 4, "attr-defined")),
    ], done.stdout + done.stderr

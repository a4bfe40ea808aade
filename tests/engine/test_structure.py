"""The engine as text: who imports whom, and how long things are; and that dispatch is typed."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import engine
import pytest

ROOT = Path(engine.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up; a module imports at run time from lower layers only, so there are no cycles.
LAYERS = [
    {"exceptions", "hooks", "kinds", "shard_files", "untrusted", "older_names", "version"},
    {"rendezvous"},
    {"distributed"},
    {"last_words", "fsdp", "seed", "callback", "meters", "precision", "signals", "strategies", "utilities", "export"},
    {"shards", "faults"},
    {"checkpoint"},
    {"checkpoint_writer", "consolidate"},
    {"metrics", "hparams", "samples", "older", "callbacks.monitor"},
    {"module", "datamodule", "optim", "reading", "elastic", "loggers.logger", "alike"},
    {"data", "resume", "hook_checks", "profilers", "loggers.csv_logs", "loggers.tensorboard"},
    {"evaluation", "loggers"},
    {"optimization"},
    {"loops"},
    {
        *("callbacks.checkpoint", "callbacks.early_stopping", "callbacks.gradient_accumulation_scheduler"),
        *("callbacks.learning_rate_monitor", "callbacks.prediction_writer"),
        *("callbacks.progress", "callbacks.terminal", "callbacks.timer", "callbacks.weight_averaging"),
    },
    {"callbacks.model_checkpoint", "callbacks.learning_rate_finder", "callbacks.stochastic_weight_avg"},
    {"callbacks.checkpoint_search"},
    {"callbacks"},
    {"arguments", "trainer_properties"},
    {"lifecycle"},
    {"trainer"},
    {"", "__main__"},
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


def code_lines(path: Path) -> int:
    """Lines of code, without docstrings, comments and blank lines."""
    text, lines = path.read_text(encoding="utf-8"), set[int]()
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


# What a run is made of. Around it: files and faults, programs of older versions, and what is chosen.
CORE = {"", "arguments", "callback", "data", "datamodule", "evaluation", "exceptions", "hooks", "kinds"}
CORE |= {"lifecycle", "loops", "meters", "metrics", "module", "optim", "optimization", "precision", "reading"}
CORE |= {"samples", "seed", "trainer", "trainer_properties"}
# What several processes need.
SEVERAL = {"distributed", "strategies", "fsdp", "shards", "shard_files", "consolidate", "elastic"}
SEVERAL |= {"rendezvous", "alike", "last_words"}


def test_the_engine_stays_small() -> None:
    core = [path for path in FILES if name_of(path) in CORE]
    extra = [path for path in FILES if name_of(path).split(".")[0] in ("callbacks", "loggers", "profilers")]
    several = [path for path in FILES if name_of(path) in SEVERAL]
    around = [path for path in FILES if path not in (*core, *extra, *several)]
    parts = {"core": (core, 2978), "around it": (around, 1503), "callbacks, loggers, profilers": (extra, 2104)}
    parts["several processes"] = (several, 1011)
    for name, (paths, most) in parts.items():
        code = sum(map(code_lines, paths))
        print(f"\n{name}: {code} lines of code, {sum(map(lines, paths))} with docstrings, comments and blank lines")
        assert code <= most, name


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


@pytest.mark.long
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

"""What several processes of a project say together: what one says, once."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

SHORT = ("--max_epochs", "2", "--limit_train_batches", "3", "--limit_val_batches", "3", "--limit_test_batches", "3")
SHORT += ("--model.width", "4", "--batch_size", "8", "--enable_autolog_hparams", "true", "--save_every_n_steps", "2")


@pytest.fixture
def start(project: Path) -> Callable[..., Any]:
    """Starts `main.py` in several processes; `words` may be a function of the rank."""
    injection = importlib.import_module("injection")
    main = importlib.import_module("main").main

    def start(words: Any, processes: int = 2) -> Any:
        def work() -> None:
            main(list(words(int(os.environ["RANK"])) if callable(words) else words))

        return injection.launched(work, processes)

    return start


def error_lines(child: Any) -> list[str]:
    """What was said on the error stream before torchrun's own report."""
    own = re.split(r"^[WE]\d{4} ", child.err, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in own.splitlines() if line and "OMP_NUM_THREADS" not in line and "****" not in line]


REFUSED = {
    "flag": (("--max_epoch", "2"), "--max_epoch: there is no such argument; did you mean --max_epochs?"),
    "value": (("--batch_size", "many"), "--batch_size many: give a whole number"),
    "command": (("fitt",), "fitt: the commands are"),
    "trainer": ((*SHORT, "--limit_train_batches", "-1"), "limit_train_batches=-1 makes no sense"),
    "net": (("--model_name", "no_such_net"), "no_such_net"),
    "set-up": ((*SHORT, "--num_sanity_val_steps", "0", "--val_check_interval", "99"), "val_check_interval=99"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_input_is_refused_once(kind: str, start: Callable) -> None:
    words, message = REFUSED[kind]
    child = start(words, 4 if kind == "flag" else 2)
    assert child.end() == 1
    [line] = error_lines(child)
    assert line.startswith("error: ") and message in line
    assert "exitcode  : 2" in child.err.rpartition("Root Cause")[2]


def test_arguments_that_differ_are_refused_once(start: Callable) -> None:
    child = start(lambda rank: (*SHORT, "--batch_size", str(8 + rank), "--lr", f"0.{rank + 1}"))
    assert child.end() == 1
    [line] = error_lines(child)
    assert "lr (MInterface) is 0.1 on rank 0, 0.2 on rank 1; batch_size (DInterface) is 8 on rank 0, 9 on rank" in line
    assert "exitcode  : 2" in child.err.rpartition("Root Cause")[2]
    # Nothing of a run that was refused is left.
    assert not [*Path("logs").glob("*/*")]


def test_help_is_printed_once(start: Callable) -> None:
    child = start(("--help",))
    assert child.end() == 0
    assert child.out.count("usage: main.py") == 1 and child.out.count("--max_epochs") == 1


def shape(text: str) -> list[str]:
    """Lines without their numbers, and without what torchrun says."""
    lines = [re.sub(r"[-\d.,]+|version_\d", "#", line).rstrip() for line in text.splitlines()]
    return [re.sub(r" +", " ", line) for line in lines if line and "****" not in line and "OMP_NUM" not in line]


def files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(re.sub(r"tfevents.*", "tfevents", name) for name in names)


@pytest.mark.long
def test_several_processes_print_and_write_what_one_does(start: Callable, project: Path) -> None:
    outputs, left = [], []
    for processes in (1, 2, 4):
        child = start((*SHORT, "--log_dir", f"of_{processes}"), processes)
        assert child.end(120) == 0, child.err
        outputs.append((shape(child.out.replace(f"of_{processes}", "logs")), shape(child.err)))
        left.append(files(project / f"of_{processes}"))
    assert outputs[1] == outputs[0] and outputs[2] == outputs[0]
    assert left[1] == left[0] and left[2] == left[0]
    assert outputs[0][1] == [] and "standard_net/version_0/environment.json" in left[0]

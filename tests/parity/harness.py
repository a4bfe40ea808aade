"""Runs one program on our engine and on Lightning, and compares what the two did."""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import engine
import parts
import pytorch_lightning as lightning
import torch
from deviations import EVERYWHERE, Deviation
from recording import CALLBACK_HOOKS, CLOSURES, DATAMODULE_HOOKS, MODULE_HOOKS, differences, recorded, state

for _name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "max_epochs": 2,
}


class Side:
    """One engine at work: makes recorded parts of user code, and keeps what was observed.

    Args:
        pl: `engine` or `pytorch_lightning`.
        closures: Whether the hooks that replace the optimizer's step are recorded, too.
        folder: Working folder of this run.
    """

    def __init__(self, pl: ModuleType, closures: bool, folder: Path) -> None:
        self.pl, self.closures, self.folder = pl, closures, folder
        self.trace: list[str] = []
        self.logger = parts.RecordingLogger(self.note)
        self.observed: dict[str, Any] = {}
        self.last: Any = None
        self.last_module: Any = None

    def note(self, text: str, name: str = "", owner: Any = None) -> None:
        """Add a line to the trace."""
        seen = ""
        if self.last is not None and self.last_module is not None:
            seen = "  | " + state(self.last, self.last_module, name)
        self.trace.append(text + seen)

    def module(self, cls: Any = None, **options: Any) -> Any:
        """An instance, recorded as M, of the class that `cls(pl)` gives; the same weights every time."""
        hooks = [*MODULE_HOOKS, *CLOSURES] if self.closures else MODULE_HOOKS
        torch.manual_seed(0)
        self.last_module = recorded((cls or parts.net)(self.pl), "M", hooks, self.note)(**options)
        return self.last_module

    def datamodule(self, cls: Any = None, **options: Any) -> Any:
        """An instance, recorded as D."""
        return recorded((cls or parts.data)(self.pl), "D", DATAMODULE_HOOKS, self.note)(**options)

    def callback(self, cls: Any = None, letter: str = "C", **options: Any) -> Any:
        """An instance, recorded as C; by default of a callback that does nothing."""
        return recorded(cls(self.pl) if cls else self.pl.Callback, letter, CALLBACK_HOOKS, self.note)(**options)

    def trainer(self, **options: Any) -> Any:
        """A quiet Trainer with the recording logger and, unless `callbacks` are given, one recorded callback."""
        options = {"callbacks": [self.callback()], "logger": self.logger, **QUIET, **options}
        self.last = None
        self.last = self.pl.Trainer(**options)
        return self.last

    def observe(self, name: str, value: Any) -> None:
        """Keep a value to be compared."""
        self.observed[name] = value

    def finish(self) -> None:
        """Look at what the program left behind."""
        trainer, module = self.last, self.last_module
        if module is not None:
            self.observed["weights"] = {name: value.clone() for name, value in module.state_dict().items()}
        if trainer is not None and self.observed["error"] is None:
            for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
                self.observed[name] = {key: float(value) for key, value in getattr(trainer, name).items()}
        if trainer is not None:
            self.observed["global_step"] = trainer.global_step
            self.observed["current_epoch"] = trainer.current_epoch
            self.observed["should_stop"] = trainer.should_stop
        self.observed["files"] = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*.ckpt"))
        self.observed["log"] = self.logger.rows


Program = Callable[[Side], None]


def run_on(pl: ModuleType, program: Program, closures: bool, folder: Path) -> Side:
    """Run a program on one engine; an exception that it raises is an observation like others."""
    side = Side(pl, closures, folder)
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program(side)
        side.observed["error"] = None
    except BaseException as error:
        if os.environ.get("PARITY_RAISE") == pl.__name__:
            raise
        side.observed["error"] = type(error).__name__
        side.observed["message"] = str(error)
    finally:
        os.chdir(before)
    message = side.observed.pop("message", "")
    side.finish()
    side.observed["message"] = message
    return side


def same(program: Program, *deviations: Deviation, closures: bool = False, refused: bool = False) -> None:
    """Fail unless both engines do the same, but for the named deviations, each of which must occur.

    Args:
        program: User code.
        *deviations: Where the engines differ on purpose.
        closures: Record the hooks, too, that replace the optimizer's step.
        refused: Both engines must refuse the program with an error.
    """
    ours, theirs = (run_on(pl, program, closures, Path.cwd() / pl.__name__) for pl in (engine, lightning))
    for side in (ours, theirs):
        assert not refused or side.observed["error"], f"{side.pl.__name__} does not refuse this"
    compare(ours, theirs, deviations)


def compare(ours: Side, theirs: Side, deviations: tuple[Deviation, ...] = ()) -> None:
    """Fail unless two runs are the same, but for the deviations, each of which must occur."""
    for deviation in (*EVERYWHERE, *(d for d in deviations if d not in EVERYWHERE)):
        found = deviation.apply(ours, theirs)
        assert found or deviation not in deviations, f"nothing in this scenario deviates like this: {deviation.reason}"
    messages = [side.observed.pop("message") for side in (ours, theirs)]
    context = f"\nerrors: ours {messages[0]!r}, theirs {messages[1]!r}" if any(messages) else ""
    if ours.trace != theirs.trace:
        lines = difflib.unified_diff(theirs.trace, ours.trace, "Lightning", "ours", lineterm="", n=3)
        raise AssertionError("the hooks differ:\n" + "\n".join(list(lines)[:80]) + context)
    if found := differences(ours.observed, theirs.observed):
        raise AssertionError("what was observed differs:\n" + "\n".join(found[:40]) + context)

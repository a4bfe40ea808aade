"""What callbacks that save have in common. OnExceptionCheckpoint: save when a run fails."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine import checkpoint, distributed
from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class Checkpoint(Callback):
    """Base of callbacks that save checkpoints: they run after all others, and see the metrics of an epoch."""

    monitoring: ClassVar[bool] = True


class OnExceptionCheckpoint(Checkpoint):
    """Saves the state in which training fails; the file goes once a run ends well.

    Args:
        dirpath: Folder.
        filename: Name without `.ckpt`.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise MisconfigurationException("filename=''; give a name")
        self.dirpath, self.filename = dirpath, filename
        self._failed = False

    @property
    def ckpt_path(self) -> str:
        """The file."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Save."""
        self._failed = True
        save_after(trainer, exception, self.ckpt_path)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Remove the file of an earlier run that failed."""
        if not self._failed and trainer.is_global_zero:
            Path(self.ckpt_path).unlink(missing_ok=True)
        self._failed = False


def save_after(trainer: Trainer, exception: BaseException, path: str, weights_only: bool = False) -> None:
    """Save training as it stands after an exception; a run that goes on from within a batch does that batch again."""
    if trainer.stage != "fit" or trainer.fast_dev_run or trainer.sanity_checking or not trainer.global_step:
        return
    name = type(exception).__name__
    if distributed.active():
        distributed.rank_zero_warn(
            f"nothing was saved after {name}: saving takes all processes, and others may be fine"
        )
        return
    trainer.save_checkpoint(path, weights_only)
    print(f"{name}: saved {path}", flush=True)


def link(path: Path, name: Path, softly: bool) -> None:
    """Make `name` the same file as `path`, or a symbolic link to it."""
    if softly:
        temporary = name.with_name(f"{name.name}{checkpoint.TEMPORARY}")
        # Some systems have none, or not for everybody.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(path, name.parent))
            os.replace(temporary, name)
            return
    checkpoint.link(path, name)


def check_numbers(save_top_k: int, save_last: Any, monitor: str | None) -> None:
    """Refuse numbers of files that make no sense."""
    if save_top_k < -1 or (monitor is None and save_top_k > 1):
        raise MisconfigurationException(
            f"save_top_k={save_top_k}, monitor={monitor!r}; give -1, 0 or 1, or more with a value to monitor"
        )
    if save_last not in (None, True, False, "link"):
        raise MisconfigurationException(f"save_last={save_last!r}; give True, False or 'link'")


def check_triggers(steps: int | None, epochs: int | None, interval: timedelta | None) -> None:
    """Refuse numbers that make no sense, and more than one of them."""
    for name, every in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if every is not None and (type(every) is not int or every < 0):
            raise MisconfigurationException(f"{name}={every!r}; give a whole number from 0")
    if interval is not None and not isinstance(interval, timedelta):
        raise MisconfigurationException(f"train_time_interval={interval!r}; give a datetime.timedelta")
    if bool(steps) + bool(epochs) + (interval is not None) > 1:
        raise MisconfigurationException(
            "every_n_train_steps, every_n_epochs, train_time_interval: give one of them, or several ModelCheckpoints"
        )

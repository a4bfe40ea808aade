"""Timer: how long the stages take, and the end of training after a given time."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from engine import distributed
from engine.callback import Callback
from engine.exceptions import MisconfigurationException
from engine.signals import seconds_of

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

STAGES = ("train", "sanity_check", "validate", "test", "predict")


def _noting(times: str, stage: str) -> Any:
    """A hook that notes the time."""

    def hook(self: Timer, trainer: Trainer, pl_module: Module) -> None:
        getattr(self, times)[stage] = time.monotonic()
        if times == "_start":
            self._end.pop(stage, None)

    return hook


class Timer(Callback):
    """Measures the time of training, validation and test, and stops training when it is up.

    The time of training goes on where a run is resumed.

    Args:
        duration: How long to train: days:hours:minutes:seconds, a timedelta, or a dict of its arguments; None for ever.
        interval: Stop after a "step", or after an "epoch".
        verbose: Print that the time is up.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: Literal["step", "epoch"] = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(f"interval={interval!r}; give step or epoch")
        self._duration, self._interval, self._verbose = seconds_of(duration, "duration"), interval, verbose
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._offset = 0.0
        self._stopped = False

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage began, in seconds of `time.monotonic`; None if it has not."""
        return self._start.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage ended, in seconds of `time.monotonic`; None if it has not."""
        return self._end.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds of a stage so far."""
        start, end, offset = self.start_time(stage), self.end_time(stage), self._offset if stage == "train" else 0.0
        return offset if start is None else (time.monotonic() if end is None else end) - start + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left; None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of each stage."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in STAGES}, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._offset = float(state_dict["time_elapsed"]["train"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Let a run go on that this has stopped, where there is more time now."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        more = saved and (self._duration is None or saved["time_elapsed"]["train"] < self._duration)
        if trainer.stage == "fit" and more and saved["stopped"]:
            checkpoint["state"]["should_stop"] = False

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Stop at once if a run that goes on has used its time."""
        self._check(trainer)

    on_train_start, on_train_end = _noting("_start", "train"), _noting("_end", "train")
    on_validation_start, on_validation_end = _noting("_start", "validate"), _noting("_end", "validate")
    on_test_start, on_test_end = _noting("_start", "test"), _noting("_end", "test")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *args: Any, **kwargs: Any) -> None:
        """Stop if the time is up."""
        if self._interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Stop if the time is up."""
        if self._interval == "epoch":
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self._duration is not None and distributed.broadcast(self.time_elapsed() >= self._duration):
            trainer.should_stop = self._stopped = True
            if self._verbose and trainer.is_global_zero:
                print(f"Timer: {timedelta(seconds=int(self.time_elapsed()))} have passed; training stops", flush=True)


def _known(stage: str) -> str:
    if stage not in STAGES:
        raise MisconfigurationException(f"stage={stage!r}; give one of {', '.join(STAGES)}")
    return stage

"""EarlyStopping: end a run that no longer improves. Also how callbacks read the value that they watch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine import distributed
from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class EarlyStopping(Callback):
    """Stops training when a logged value has not improved for `patience` checks.

    A check happens at the end of every epoch in which the value was computed.

    Args:
        monitor: Name of the value.
        min_delta: Improvement that counts as none; improving by exactly this much does not count.
        patience: Checks without improvement until the end.
        mode: "min" where less is better, "max" where more is.
        check_finite: Stop as soon as the value is NaN or infinite.
        stopping_threshold: Stop as soon as the value is better than this.
        divergence_threshold: Stop as soon as the value is worse than this.
    """

    monitoring: ClassVar[bool] = True

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: Literal["min", "max"] = "min",
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        check_mode(mode)
        if patience < 1:
            raise MisconfigurationException(f"patience={patience}; give a whole number from 1")
        self.monitor, self.mode = monitor, mode
        self.min_delta, self.patience, self.check_finite = abs(min_delta), patience, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = ""
        self.best_score = math.inf if mode == "min" else -math.inf

    @property
    def state_key(self) -> str:
        """Told apart by what is watched."""
        return f"EarlyStopping[{self.monitor}, {self.mode}]"

    def state_dict(self) -> dict[str, Any]:
        """Progress so far."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "stopping_reason": self.stopping_reason,
            "patience": self.patience,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.wait_count, self.stopped_epoch = int(state_dict["wait_count"]), int(state_dict["stopped_epoch"])
        self.best_score, self.stopping_reason = float(state_dict["best_score"]), str(state_dict["stopping_reason"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Let a run go on that has stopped for lack of patience, where there is more of it now."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.stage == "fit" and saved is not None and saved["patience"] <= saved["wait_count"] < self.patience:
            checkpoint["state"]["should_stop"] = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Check, and tell the trainer if it is time."""
        if trainer.fast_dev_run:
            return
        value = monitored_value(trainer, self.monitor, "EarlyStopping")
        if value is None:
            return
        # A value not reduced over processes may differ between them; any of them ends the run for all.
        reasons = distributed.all_gather(self._reason_to_stop(value))
        self.stopping_reason = next((reason for reason in reasons if reason), "")
        if self.stopping_reason:
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"EarlyStopping: {self.stopping_reason}")

    def _reason_to_stop(self, value: float) -> str:
        if self.check_finite and not math.isfinite(value):
            return f"{self.monitor} is {value}"
        if self.stopping_threshold is not None and self._better(value, self.stopping_threshold):
            return f"{self.monitor}={value:.4g} passed stopping_threshold={self.stopping_threshold}"
        if self.divergence_threshold is not None and self._better(self.divergence_threshold, value):
            return f"{self.monitor}={value:.4g} passed divergence_threshold={self.divergence_threshold}"
        margin = -self.min_delta if self.mode == "min" else self.min_delta
        if self._better(value, self.best_score + margin):
            self.best_score, self.wait_count = value, 0
            return ""
        self.wait_count += 1
        if self.wait_count < self.patience:
            return ""
        return f"{self.monitor} has not been better than {self.best_score:.4g} for {self.patience} checks"

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than


def check_mode(mode: str) -> None:
    """Refuse a mode that is neither min nor max."""
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"mode={mode!r}; give 'min' where less is better, 'max' where more is")


def monitored_value(trainer: Trainer, name: str, who: str) -> float | None:
    """The value logged under `name` in this epoch.

    Returns:
        None where it has not been computed in this epoch, because validation was not due.

    Raises:
        MisconfigurationException: Nothing of that name was ever logged, though validation has run.
    """
    metrics = trainer.callback_metrics
    if name in trainer.metrics.fresh:
        return float(metrics[name])
    if name in metrics or (trainer.validates and not trainer.metrics.validated):
        return None
    raise MisconfigurationException(
        f"{who} watches {name!r}, which was never logged; logged are: {', '.join(sorted(metrics)) or 'none'}"
    )

"""EarlyStopping: end a run that no longer improves."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from engine import distributed
from engine.callback import Callback
from engine.callbacks.monitor import check_mode, looks_at_epoch_end, monitored_value, validated_in_fit
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Why a run was stopped."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Stops training when a logged value has not improved for `patience` checks.

    A check happens where the value was computed: at the end of epochs or, where the trainer validates more or less
    often than once an epoch, at the end of validations.

    Args:
        monitor: Name of the value.
        min_delta: Improvement that counts as none; improving by exactly this much does not count.
        patience: Checks without improvement until the end.
        verbose: Print every improvement, too.
        mode: "min" where less is better, "max" where more is.
        strict: End the run if nothing of that name is logged; otherwise nothing is checked.
        check_finite: Stop as soon as the value is NaN or infinite.
        stopping_threshold: Stop as soon as the value is better than this.
        divergence_threshold: Stop as soon as the value is worse than this.
        check_on_train_epoch_end: Check at the end of epochs, or of validations; default: as above.
        log_rank_zero_only: Where `verbose`, only the first process prints.

    Attributes:
        best_score: The best value so far.
        wait_count: Checks since it was reached.
        stopped_epoch: The epoch in which the run was stopped; 0 while it was not.
        stopping_reason: Why it was stopped.
        stopping_reason_message: The same in words; None while it was not.
    """

    monitoring: ClassVar[bool] = True

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Literal["min", "max"] = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        check_mode(mode)
        if type(patience) is not int or patience < 0:
            raise MisconfigurationException(f"patience={patience!r}; give a whole number from 0")
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.monitor_op = torch.lt if mode == "min" else torch.gt
        self.min_delta = -min_delta if mode == "min" else min_delta
        self.verbose, self.strict, self.check_finite = verbose, strict, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.check_on_train_epoch_end, self.log_rank_zero_only = check_on_train_epoch_end, log_rank_zero_only
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)

    @property
    def state_key(self) -> str:
        """Told apart by what is watched."""
        return f"EarlyStopping{ {'monitor': self.monitor, 'mode': self.mode} }"

    def state_dict(self) -> dict[str, Any]:
        """Progress so far."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": float(self.best_score),
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.wait_count, self.stopped_epoch = int(state_dict["wait_count"]), int(state_dict["stopped_epoch"])
        self.best_score = torch.tensor(float(state_dict["best_score"]))
        self.stopping_reason = EarlyStoppingReason(state_dict["stopping_reason"])
        self.stopping_reason_message = state_dict["stopping_reason_message"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Let a run go on that has stopped for lack of patience, where there is more of it now."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.stage == "fit" and saved is not None and saved["patience"] <= saved["wait_count"] < self.patience:
            checkpoint["state"]["should_stop"] = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Check, if epochs are what counts."""
        if looks_at_epoch_end(trainer, self.check_on_train_epoch_end):
            self._check(trainer, fresh=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Check, if validations are what counts."""
        if validated_in_fit(trainer) and not looks_at_epoch_end(trainer, self.check_on_train_epoch_end):
            self._check(trainer, fresh=False)

    def _check(self, trainer: Trainer, fresh: bool) -> None:
        """Tell the trainer if it is time to stop."""
        if trainer.fast_dev_run:
            return
        try:
            value = monitored_value(trainer, self.monitor, "EarlyStopping", fresh)
        except MisconfigurationException as error:
            if self.strict:
                raise
            if self.verbose:
                distributed.rank_zero_warn(str(error))
            value = None
        # A value not reduced over processes may differ between them, or be there in some; any ends the run for all.
        own = (EarlyStoppingReason.NOT_STOPPED, "") if value is None else self._judge(value)
        judged = distributed.all_gather(own)
        stopped = [(reason, message) for reason, message in judged if reason is not EarlyStoppingReason.NOT_STOPPED]
        message = stopped[0][1] if stopped else judged[distributed.rank()][1] if self.verbose else ""
        if stopped:
            self.stopping_reason, self.stopping_reason_message = stopped[0]
            self.stopped_epoch, trainer.should_stop = trainer.current_epoch, True
        if message and (trainer.is_global_zero or (self.verbose and not self.log_rank_zero_only)):
            where = f"[rank: {distributed.rank()}] " if distributed.active() else ""
            print(f"{where}EarlyStopping: {message}", flush=True)

    def _judge(self, value: Tensor) -> tuple[EarlyStoppingReason, str]:
        """Whether to stop, and what there is to say."""
        better, name = self.monitor_op, self.monitor
        if self.check_finite and not torch.isfinite(value):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"{name} is {value}"
        if self.stopping_threshold is not None and better(value, self.stopping_threshold):
            message = f"{name}={value:.4g} passed stopping_threshold={self.stopping_threshold}"
            return EarlyStoppingReason.STOPPING_THRESHOLD, message
        if self.divergence_threshold is not None and better(-value, -self.divergence_threshold):
            message = f"{name}={value:.4g} passed divergence_threshold={self.divergence_threshold}"
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, message
        if better(value - self.min_delta, self.best_score):
            self.best_score, self.wait_count = value, 0
            return EarlyStoppingReason.NOT_STOPPED, f"{name}={value:.4g} is the best so far"
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, ""
        message = f"{name} has not been better than {self.best_score:.4g} for {self.wait_count} checks"
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, message

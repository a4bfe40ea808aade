"""LearningRateMonitor: the learning rate of every parameter group, in the logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs learning rates as `lr-AdamW`, or `lr-AdamW/pg1` and so on where there are several groups.

    A scheduler's `name` takes the place of `lr-AdamW`.

    Args:
        logging_interval: "step": with every logged step; "epoch": at the start of every epoch.
    """

    def __init__(self, logging_interval: Literal["step", "epoch"] = "step") -> None:
        if logging_interval not in ("step", "epoch"):
            raise MisconfigurationException(f"logging_interval={logging_interval!r}; give step or epoch")
        self.logging_interval = logging_interval

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """Log the rate that the coming optimizer step uses."""
        if self.logging_interval != "step" or (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            trainer.log_metrics(self._rates(trainer), trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Log the rate that the coming epoch starts with."""
        if self.logging_interval == "epoch":
            trainer.log_metrics(self._rates(trainer), trainer.global_step)

    def _rates(self, trainer: Trainer) -> dict[str, float]:
        optimizer = trainer.optimizers[0]
        names = [config.name for config in trainer.lr_scheduler_configs if config.name]
        name = names[0] if names else f"lr-{type(optimizer).__name__}"
        groups = optimizer.param_groups
        labels = [name] if len(groups) == 1 else [f"{name}/pg{number}" for number in range(1, len(groups) + 1)]
        return {label: float(group["lr"]) for label, group in zip(labels, groups, strict=True)}

"""GradientAccumulationScheduler: accumulate more or fewer batches as training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.callback import Callback
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Changes the trainer's `accumulate_grad_batches` at the start of epochs.

    Args:
        scheduling: Batches to accumulate, by the epoch from which on they count; {0: 1, 4: 2} doubles from the fifth.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        numbers = [(epoch, 0) for epoch in scheduling] + [(batches, 1) for batches in scheduling.values()]
        if not numbers or any(type(number) is not int or number < least for number, least in numbers):
            raise MisconfigurationException(
                f"scheduling={scheduling!r}; give epochs from 0, and batches from 1 for each"
            )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._running = False

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether there is any accumulation."""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """How many batches are accumulated in an epoch."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Refuse a trainer that accumulates by itself."""
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            given = f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
            raise MisconfigurationException(f"{given} and GradientAccumulationScheduler: give one of them")
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException("GradientAccumulationScheduler needs automatic optimization; leave it out")
        self._running = stage == "fit"

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Go on within an epoch as it was begun."""
        if trainer.stage == "fit":
            trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(checkpoint["state"]["epoch"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Set it."""
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Leave the trainer as it was."""
        if self._running:
            trainer.accumulate_grad_batches, self._running = 1, False

"""BasePredictionWriter: base of callbacks that write predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from engine.callback import Callback
from engine.exceptions import MisconfigurationException
from engine.hooks import move_to_device
from engine.reading import own_sampler

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer


class BasePredictionWriter(Callback):
    """Hands what `predict_step` returned to `write_on_batch_end`, to `write_on_epoch_end`, or to both: override these.

    With predictions come the indices of their samples; those of a loader with a sampler of its own are not known.

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            raise MisconfigurationException(f"write_interval={write_interval!r}; give batch, epoch or batch_and_epoch")
        self.interval = write_interval
        self._predictions: list[list[Any]] = []
        self._indices: list[list[list[int]]] = []
        self._batches: Iterator[list[Any]] | None = None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the predictions of a batch, which are still on the device; the indices may be None."""
        raise MisconfigurationException(f"{type(self).__name__} has no write_on_batch_end; write one")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions: batches on the CPU, in a list for each loader where there are several.

        Args:
            trainer: The trainer.
            pl_module: The module.
            predictions: What the batches gave.
            batch_indices: For each loader a list with the indices of each batch; empty where they are not known.
        """
        raise MisconfigurationException(f"{type(self).__name__} has no write_on_epoch_end; write one")

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Begin with nothing."""
        loaders = trainer.evaluation_loaders("predict").readers
        self._predictions, self._indices = [[] for _ in loaders], [[] for _ in loaders]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write or keep the predictions of a batch."""
        if batch_idx == 0:
            loader = trainer.evaluation_loaders("predict").readers[dataloader_idx].loader
            # Other samplers might not give the same order again.
            self._batches = iter(loader.batch_sampler or ()) if own_sampler(loader) is not None else None
        indices = None if self._batches is None else [int(index) for index in next(self._batches, ())]
        if "epoch" in self.interval:
            self._predictions[dataloader_idx].append(move_to_device(outputs, torch.device("cpu")))
            self._indices[dataloader_idx] += [] if indices is None else [indices]
        if "batch" in self.interval:
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Write all predictions."""
        if "epoch" in self.interval:
            kept = self._predictions[0] if len(self._predictions) == 1 else self._predictions
            self.write_on_epoch_end(trainer, pl_module, kept, self._indices)

"""One program on this engine and on Lightning: the parts that both run, and a function that runs both."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from toy import loader

for _name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def on_both(program: Callable[[Any], Any], folder: Path) -> tuple[Any, Any]:
    """What `program(pl)` returns for this engine and for Lightning, each in a working folder of its own."""
    results = []
    for pl in (engine, lightning):
        own = folder / pl.__name__
        own.mkdir()
        os.chdir(own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(program(pl))
    return results[0], results[1]


def net(pl: Any) -> Any:
    """A class of modules that both engines train: linear regression, or whatever `layers` makes."""

    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(
            self,
            layers: Callable[[], nn.Module] = lambda: nn.Linear(3, 1),
            optimizers: Callable[[Any], Any] = lambda net: torch.optim.SGD(net.parameters(), lr=net.lr),
            scores: list[float] | None = None,
        ) -> None:
            super().__init__()
            self.lr, self._optimizers, self.scores = 0.1, optimizers, scores
            torch.manual_seed(0)
            self.net = layers()

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def on_validation_epoch_end(self) -> None:
            if self.scores is not None and not self.trainer.sanity_checking:
                self.log("score", self.scores[0])
                self.log("by/name", self.scores.pop(0))

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return self._optimizers(self)

    return Net


def memory(pl: Any) -> Any:
    """A logger that keeps rows of (step, values)."""
    base = engine.loggers.Logger if pl is engine else lightning.loggers.logger.Logger

    class Memory(base):  # type: ignore[misc,valid-type]
        name = version = "memory"

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

    return Memory()


def fitted(pl: Any, module: Any, callbacks: Any, size: int = 8, **options: Any) -> Any:
    """A trainer that has fitted `module` on `size` samples in batches of 2, and validated on 2."""
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": callbacks, **options})
    trainer.fit(module, loader(size), loader(2))
    return trainer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}

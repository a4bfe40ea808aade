"""The Trainer of this template."""

from __future__ import annotations

from typing import Any

import engine
import torch
from engine.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from contenders.task import CLASSES, Task, loss_of, optimizer_of


class Classifier(engine.Module):
    """A classification, as one writes it for the Trainer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.task = task.net, task
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        self.task.tick()
        loss = loss_of(self.net, batch)
        if self.task.logs:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy."""
        images, labels = batch
        scores = self.net(images)
        self.accuracy.update(scores, labels)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of all contenders."""
        return optimizer_of(self.parameters())


def run(task: Task) -> None:
    """Train."""
    trainer = engine.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=task.epochs,
        logger=TensorBoardLogger(task.folder) if task.logs else False,
        enable_progress_bar=task.logs,
        enable_checkpointing=task.logs,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(task), task.batches, task.val)
    if task.val is not None:
        task.accuracy = float(trainer.callback_metrics["val_acc"])

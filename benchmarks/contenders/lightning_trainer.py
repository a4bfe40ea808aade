"""Lightning's Trainer, as it comes, and in its barebones mode, which is made for measuring its overhead."""

from __future__ import annotations

import lightning as pl
import torch
from epochs import Epochs
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from work import Batch, Work


class Training(pl.LightningModule):
    """A classification."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.net, self.optimizer, self.realistic = work.net, work.optimizer, work.realistic

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        if self.realistic:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's."""
        return self.optimizer(self.parameters())


def train(work: Work) -> None:
    """Steps on batches."""
    if work.variant == "barebones":
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    elif work.realistic:
        logger = TensorBoardLogger(work.folder)
        saver = ModelCheckpoint(every_n_train_steps=work.save_every)
        # Its own choice where rich is not installed, as with Lightning alone; here rich is, for others.
        plain = [TQDMProgressBar(), ModelSummary()]
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=logger, callbacks=[saver, *plain])
    else:
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **QUIET)
    trainer.fit(Training(work), work.batches)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classification(pl.LightningModule):
    """A classification with validation."""

    def __init__(self, work: Epochs) -> None:
        super().__init__()
        self.net, self.optimizer = work.net, work.optimizer
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        images, labels = batch
        scores = self.net(images)
        self.accuracy.update(scores, labels)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels))

    def on_validation_epoch_end(self) -> None:
        """The accuracy of the epoch."""
        # Barebones, nobody would reset a metric that is logged.
        self.result = self.accuracy.compute()
        self.accuracy.reset()
        self.log("val_acc", self.result)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's."""
        return self.optimizer(self.parameters())


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    if work.variant == "barebones":
        trainer = pl.Trainer(accelerator="cpu", max_epochs=work.epochs, barebones=True)
    else:
        trainer = pl.Trainer(accelerator="cpu", max_epochs=work.epochs, num_sanity_val_steps=0, **QUIET)
    module = Classification(work)
    trainer.fit(module, work.train, work.val)
    return module.result.item()

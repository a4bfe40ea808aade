"""Lightning's Trainer, as it comes, and in its barebones mode, which is made for measuring its overhead."""

from __future__ import annotations

import lightning as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
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
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=logger, callbacks=[saver])
    else:
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **QUIET)
    trainer.fit(Training(work), work.batches)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

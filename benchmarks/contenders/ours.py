"""This Trainer."""

from __future__ import annotations

from typing import Any

import engine
import torch
from epochs import SEED, Epochs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from work import Batch, Work


class Training(engine.Module):
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
    if work.realistic:
        from engine.callbacks import ModelCheckpoint

        saver = ModelCheckpoint(every_n_train_steps=work.save_every)
        trainer = engine.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=work.folder, callbacks=[saver])
    else:
        trainer = engine.Trainer(accelerator="cpu", max_epochs=1, **QUIET)
    trainer.fit(Training(work), work.batches)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classification(engine.Module):
    """A classification with validation."""

    def __init__(self, work: Epochs) -> None:
        # Who only trains does without.
        from torchmetrics.classification import MulticlassAccuracy

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
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's."""
        return self.optimizer(self.parameters())


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    if work.variant == "generated project":
        return epochs_of_project(work)
    if work.variant == "own sampler":
        return fit_epochs(work, [], Classification(work), train_dataloaders=work.train, val_dataloaders=work.val)
    # As its users write it. The order comes from the seed, and is everyone's.
    options: dict[str, Any] = {name: getattr(work.train, name) for name in ("batch_size", "collate_fn", "pin_memory")}
    loaders = {
        "train_dataloaders": DataLoader(work.train.dataset, shuffle=True, **options),
        "val_dataloaders": work.val,
    }
    return fit_epochs(work, [AtEpochs(work)], Classification(work), **loaders)


class AtEpochs(engine.Callback):
    """Tells when an epoch starts."""

    def __init__(self, work: Epochs) -> None:
        self.border = work.border

    def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
        """Tell it."""
        self.border()


def epochs_of_project(work: Epochs) -> float:
    """Training and validation as a generated project does it, with an optimizer of its own."""
    from data import DInterface
    from model import MInterface

    model = MInterface(lr=1e-3, lr_schedule="constant", model=work.task.model)
    return fit_epochs(work, [AtEpochs(work)], model, datamodule=DInterface(**work.task.data, num_workers=0))


def fit_epochs(work: Epochs, callbacks: list[engine.Callback], model: engine.Module, **data: Any) -> float:
    """Train and validate on what `fit` takes as data; returns the accuracy."""
    options: dict[str, Any] = {"max_epochs": work.epochs, "callbacks": callbacks, "num_sanity_val_steps": 0}
    trainer = engine.Trainer(accelerator="cpu", **options, **QUIET)
    engine.seed_everything(SEED)
    trainer.fit(model, **data)
    return trainer.callback_metrics["val_acc"].item()

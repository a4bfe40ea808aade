"""What every contender is given, so that all do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

# Steps from one value in the logs to the next, as is the default of Lightning and of ours.
LOG_EVERY = 50
CLASSES = 10


@dataclass
class Task:
    """A classification.

    Attributes:
        net: What is trained, with its weights.
        batches: The loader to train on.
        val: The loader to validate on after each epoch, for loss and accuracy; None for no validation.
        epochs: How often to go through the batches.
        logs: Show a progress bar, write the loss to TensorBoard, and save a checkpoint after each epoch.
        barebones: Lightning only: switch off all that can be switched off.
        folder: Where logs and checkpoints go.
        tick: To be called first in each training step: the clock stands there.
        accuracy: What was found by the last validation.
    """

    net: nn.Module
    batches: Any
    val: Any
    epochs: int
    logs: bool
    barebones: bool
    folder: str
    tick: Callable[[], None]
    accuracy: float | None = None


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of all contenders."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch."""
    images, labels = batch
    return nn.functional.cross_entropy(net(images), labels)


@torch.no_grad()
def validate(net: nn.Module, val: Any) -> float:
    """Accuracy over a validation loader, computed beside the mean loss: for all loops that are written by hand."""
    mean, accuracy = MeanMetric(), MulticlassAccuracy(CLASSES, average="micro")
    net.eval()
    for images, labels in val:
        scores = net(images)
        mean.update(nn.functional.cross_entropy(scores, labels), len(labels))
        accuracy.update(scores, labels)
    mean.compute()
    return float(accuracy.compute())

"""What a contender of the epoch race is handed: the net, the loaders, and the counts that show what it has done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mnist
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, Subset
from work import adamw

if TYPE_CHECKING:
    from engine.samples import EpochSampler


class EpochTask(NamedTuple):
    """Training and validation on a dataset of the project, in the splits that the project makes of it.

    Attributes:
        data: Arguments of DInterface.
        model: Arguments of the net, which is the standard one.
        about: What to say of it.
        whole: What to say of all its samples.
    """

    data: dict[str, Any]
    model: dict[str, Any]
    about: str
    whole: str = ""


MNIST = {"dataset": "torchvision_data", "data": {"name": "MNIST", "root": str(mnist.FOLDER)}}
ABOUT_MNIST = "28 x 28 digits in MNIST's format, cropped at random; width 4"
TASKS = {
    "digits": EpochTask({}, {}, "the default task: 8 x 8 digits, moved at random; the standard net"),
    "mnist": EpochTask(MNIST, {"width": 4}, ABOUT_MNIST, ", all 60,000: 54,000 to train, 6,000 to validate"),
}


# Seed of the order of samples.
SEED = 0


class Order(Sampler[int]):
    """All indices, in the order that this Trainer gives a loader with `shuffle=True`.

    Args:
        sampler: The sampler that draws it.
        border: Called at the start of each epoch.
    """

    def __init__(self, sampler: EpochSampler, border: Callable[[], None]) -> None:
        self.sampler, self.border, self.epochs = sampler, border, itertools.count()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.border()
        self.sampler.set_epoch(next(self.epochs))
        yield from self.sampler


@dataclass
class Epochs:
    """What to train.

    Attributes:
        task: Which task.
        net: The net.
        optimizer: Makes its optimizer.
        train: Batches of an epoch, read in this process.
        val: Batches to validate on.
        epochs: How many epochs, with loss and accuracy on the validation batches after each.
        folder: For files.
        border: To be called at the start of each epoch by those who do not read `train` itself.
        variant: Which way, where there are several.
    """

    task: EpochTask
    net: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    train: DataLoader[Any]
    val: DataLoader[Any]
    epochs: int
    folder: Path
    border: Callable[[], None]
    variant: str


def make_epochs(
    name: str, epochs: int, folder: Path, border: Callable[[], None], samples: int = 0, variant: str = ""
) -> Epochs:
    """The same weights and samples for everyone, and loaders that read them in the same order.

    Args:
        name: The task.
        epochs: How many epochs.
        folder: For files.
        border: Called at the start of each epoch.
        samples: The first so many samples of the training set, and a tenth as many to validate on; 0 for all.
        variant: Which way, where a contender has several.
    """
    from data import DInterface
    from engine.samples import EpochSampler
    from model.standard_net import StandardNet

    task = TASKS[name]
    data = DInterface(**task.data, num_workers=0)
    data.setup("fit")
    [train], [val] = (data.sets[split].values() for split in ("train", "val"))
    train, val = shortened(train, samples), shortened(val, samples // 10)
    # The project's own loaders: its datasets make batches themselves, and leave nothing to collate.
    order = Order(EpochSampler(len(train), shuffle=True, seed=SEED, even=True), border)
    loaders = data.loader(train, sampler=order, num_workers=0), data.loader(val, num_workers=0)
    torch.manual_seed(0)
    net = StandardNet(10, tuple(val[0][0].shape), **task.model)
    return Epochs(task, net, adamw, *loaders, epochs, folder, border, variant)


def places(dataset: Any) -> list[int]:
    """Where the samples of a subset, also of a subset of one, lie in the whole set."""
    if not isinstance(dataset, Subset):
        return [*range(len(dataset))]
    whole = places(dataset.dataset)
    return [whole[index] for index in dataset.indices]


def shortened(dataset: Any, samples: int) -> Any:
    """The first samples of a dataset, still read in batches."""
    return Subset(dataset, range(samples)) if samples else dataset

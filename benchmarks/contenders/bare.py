"""The loop written by hand: plain, and with everything that one wants to see of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from epochs import Epochs, places
from torch import nn
from torch.utils.data import DataLoader, Subset
from work import BATCH_SIZE, LOG_EVERY, Batch, Work


def train(work: Work) -> None:
    """Steps on batches."""
    if work.realistic:
        train_and_tell(work)
        return
    steps(work.net, work.optimizer(work.net.parameters()), work.batches)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """What all of this is compared with."""
    for images, labels in batches:
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_and_tell(work: Work) -> None:
    """The same with a bar, TensorBoard and checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    net, optimizer = work.net, work.optimizer(work.net.parameters())
    writer, bar = SummaryWriter(str(work.folder)), tqdm(work.batches)
    for step, (images, labels) in enumerate(bar, 1):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0:
            value = loss.item()
            writer.add_scalar("train_loss", value, step)
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if step % work.save_every == 0:
            save(work, optimizer)
    writer.close()


def save(work: Any, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint."""
    state = {"net": work.net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, work.folder / "last.ckpt")


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    return [accuracy for accuracy in each_batch(work) if accuracy is not None][-1]


def each_batch(work: Epochs) -> Iterator[float | None]:
    """What all of this is compared with. It stops when a batch has been read, and with an epoch's accuracy."""
    from torchmetrics.classification import MulticlassAccuracy

    net, optimizer = work.net, work.optimizer(work.net.parameters())
    train = per_sample(work) if work.variant == "per sample" else work.train
    accuracy = MulticlassAccuracy(10, average="micro")
    for _ in range(work.epochs):
        net.train()
        for images, labels in train:
            yield None
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        accuracy.reset()
        total = torch.zeros(())
        for images, labels in work.val:
            yield None
            # Not around the loop: whoever has a turn between two batches needs gradients.
            with torch.no_grad():
                scores = net(images)
                total += nn.functional.cross_entropy(scores, labels) * len(labels)
                accuracy.update(scores, labels)
        yield accuracy.compute().item()


def per_sample(work: Epochs) -> DataLoader[Any]:
    """The same training images as torchvision's examples read them: one by one, through a chain of transforms."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import v2

    convert = [v2.RandomCrop(28, padding=3), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    source = MNIST(work.task.data["data"]["root"], transform=v2.Compose(convert))
    chosen = Subset(source, places(work.train.dataset))
    return DataLoader(chosen, BATCH_SIZE, sampler=work.train.sampler)

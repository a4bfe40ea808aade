"""Lightning Fabric: the loop is the user's, the rest comes from `Fabric`. It has no bar of its own."""

from __future__ import annotations

import torch
from epochs import Epochs
from lightning.fabric import Fabric
from torch import nn
from work import LOG_EVERY, Work


def train(work: Work) -> None:
    """Steps on batches."""
    if work.realistic:
        train_and_tell(work)
        return
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    net, optimizer = fabric.setup(work.net, work.optimizer(work.net.parameters()))
    for images, labels in work.batches:
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()


def train_and_tell(work: Work) -> None:
    """The same with a bar, TensorBoard and checkpoints."""
    from lightning.fabric.loggers import TensorBoardLogger
    from tqdm import tqdm

    fabric = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(work.folder))
    fabric.launch()
    net, optimizer = fabric.setup(work.net, work.optimizer(work.net.parameters()))
    bar = tqdm(work.batches)
    for step, (images, labels) in enumerate(bar, 1):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if step % LOG_EVERY == 0:
            value = loss.item()
            fabric.log("train_loss", value, step)
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if step % work.save_every == 0:
            fabric.save(work.folder / "last.ckpt", {"net": net, "optimizer": optimizer})


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    from torchmetrics.classification import MulticlassAccuracy

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    net, optimizer = fabric.setup(work.net, work.optimizer(work.net.parameters()))
    train, val = fabric.setup_dataloaders(work.train, work.val)
    accuracy = MulticlassAccuracy(10, average="micro")
    for _ in range(work.epochs):
        net.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        net.eval()
        accuracy.reset()
        total = torch.zeros(())
        with torch.no_grad():
            for images, labels in val:
                scores = net(images)
                total += nn.functional.cross_entropy(scores, labels) * len(labels)
                accuracy.update(scores, labels)
        result = accuracy.compute().item()
    return result

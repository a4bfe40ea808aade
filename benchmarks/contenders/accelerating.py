"""Hugging Face Accelerate: the loop is the user's, `prepare` wraps what it uses. It has no bar of its own."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from epochs import Epochs
from torch import nn
from work import LOG_EVERY, Work


def train(work: Work) -> None:
    """Steps on batches."""
    if work.realistic:
        train_and_tell(work)
        return
    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(work.net, work.optimizer(work.net.parameters()))
    for images, labels in work.batches:
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


def train_and_tell(work: Work) -> None:
    """The same with a bar, TensorBoard and checkpoints."""
    from accelerate.utils import tqdm

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=work.folder)
    accelerator.init_trackers("race")
    net, optimizer = accelerator.prepare(work.net, work.optimizer(work.net.parameters()))
    bar = tqdm(work.batches)
    for step, (images, labels) in enumerate(bar, 1):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % LOG_EVERY == 0:
            value = loss.item()
            accelerator.log({"train_loss": value}, step=step)
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if step % work.save_every == 0:
            accelerator.save_state(str(work.folder / "last"))
    accelerator.end_training()


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    from torchmetrics.classification import MulticlassAccuracy

    accelerator = Accelerator(cpu=True)
    optimizer = work.optimizer(work.net.parameters())
    net, optimizer, train, val = accelerator.prepare(work.net, optimizer, work.train, work.val)
    accuracy = MulticlassAccuracy(10, average="micro")
    for _ in range(work.epochs):
        net.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        net.eval()
        accuracy.reset()
        total = torch.zeros(())
        with torch.no_grad():
            for images, labels in val:
                scores = net(images)
                total += nn.functional.cross_entropy(scores, labels) * len(labels)
                accuracy.update(*accelerator.gather_for_metrics((scores, labels)))
        result = accuracy.compute().item()
    return result

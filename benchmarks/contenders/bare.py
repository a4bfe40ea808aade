"""The loop written by hand: plain, and with everything that one wants to see of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from work import LOG_EVERY, Work


def train(work: Work) -> None:
    """Steps on batches."""
    if work.realistic:
        train_and_tell(work)
        return
    net, optimizer = work.net, work.optimizer(work.net.parameters())
    for images, labels in work.batches:
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

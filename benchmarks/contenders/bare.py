"""The loop written by hand: the plainest one, and one with bar, logs and checkpoints done well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from contenders.task import LOG_EVERY, Task, loss_of, optimizer_of, validate


def run(task: Task) -> None:
    """Train."""
    net, optimizer = task.net, optimizer_of(task.net.parameters())
    writer = SummaryWriter(task.folder) if task.logs else None
    step = 0
    for epoch in range(task.epochs):
        net.train()
        bar: Any = tqdm(task.batches, mininterval=0.2) if task.logs else task.batches
        for batch in bar:
            task.tick()
            loss = loss_of(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if writer is not None and step % LOG_EVERY == 0:
                value = loss.item()
                writer.add_scalar("train_loss", value, step)
                bar.set_postfix(train_loss=value, refresh=False)
        if task.val is not None:
            task.accuracy = validate(net, task.val)
        if task.logs:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(state, Path(task.folder, "last.ckpt"))

"""Lightning Fabric: a loop written by hand, on its wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from tqdm import tqdm

from contenders.task import LOG_EVERY, Task, loss_of, optimizer_of, validate


def run(task: Task) -> None:
    """Train."""
    loggers = [TensorBoardLogger(task.folder)] if task.logs else []
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    fabric.launch()
    net, optimizer = fabric.setup(task.net, optimizer_of(task.net.parameters()))
    batches = fabric.setup_dataloaders(task.batches)
    val = fabric.setup_dataloaders(task.val) if task.val is not None else None
    step = 0
    for epoch in range(task.epochs):
        net.train()
        bar: Any = tqdm(batches, mininterval=0.2) if task.logs else batches
        for batch in bar:
            task.tick()
            loss = loss_of(net, batch)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if task.logs and step % LOG_EVERY == 0:
                value = loss.item()
                fabric.log("train_loss", value, step)
                bar.set_postfix(train_loss=value, refresh=False)
        if val is not None:
            task.accuracy = validate(net, val)
        if task.logs:
            fabric.save(Path(task.folder, "last.ckpt"), {"net": net, "optimizer": optimizer, "epoch": epoch})

"""Accelerate: a loop written by hand, on its wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from contenders.task import LOG_EVERY, Task, loss_of, optimizer_of, validate


def run(task: Task) -> None:
    """Train."""
    tracker: dict[str, Any] = {"log_with": "tensorboard", "project_dir": task.folder} if task.logs else {}
    accelerator = Accelerator(cpu=True, **tracker)
    if task.logs:
        accelerator.init_trackers("race")
    net, optimizer, batches = accelerator.prepare(task.net, optimizer_of(task.net.parameters()), task.batches)
    val = accelerator.prepare(task.val) if task.val is not None else None
    step = 0
    for _ in range(task.epochs):
        net.train()
        bar: Any = tqdm(batches, mininterval=0.2) if task.logs else batches
        for batch in bar:
            task.tick()
            loss = loss_of(net, batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if task.logs and step % LOG_EVERY == 0:
                value = loss.item()
                accelerator.log({"train_loss": value}, step=step)
                bar.set_postfix(train_loss=value, refresh=False)
        if val is not None:
            task.accuracy = validate(net, val)
        if task.logs:
            accelerator.save_state(str(Path(task.folder, "last")))
    accelerator.end_training()

"""Hugging Face Accelerate: the loop is the user's, `prepare` wraps what it uses. It has no bar of its own."""

from __future__ import annotations

from accelerate import Accelerator
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

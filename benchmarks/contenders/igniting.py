"""PyTorch Ignite: an `Engine` runs the user's step, and handlers do the rest."""

from __future__ import annotations

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, ProgressBar, TensorboardLogger
from torch import nn
from work import LOG_EVERY, Batch, Work


def train(work: Work) -> None:
    """Steps on batches."""
    net, optimizer = work.net, work.optimizer(work.net.parameters())

    def step(engine: Engine, batch: Batch) -> float:
        images, labels = batch
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(step)
    if not work.realistic:
        trainer.run(work.batches, max_epochs=1)
        return
    ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    saver = Checkpoint({"net": net, "optimizer": optimizer}, str(work.folder), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=work.save_every), saver)
    with TensorboardLogger(log_dir=work.folder) as logger:
        event, loss = Events.ITERATION_COMPLETED(every=LOG_EVERY), {"output_transform": lambda loss: {"loss": loss}}
        logger.attach_output_handler(trainer, event, tag="train", **loss)
        trainer.run(work.batches, max_epochs=1)

"""Ignite: an Engine around the user's step, and handlers."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar, TensorboardLogger
from ignite.metrics import Accuracy, Loss
from torch import nn

from contenders.task import LOG_EVERY, Task, loss_of, optimizer_of


def run(task: Task) -> None:
    """Train."""
    net, optimizer = task.net, optimizer_of(task.net.parameters())

    def train_step(engine: Engine, batch: Any) -> float:
        task.tick()
        net.train()
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(train_step)
    if task.logs:
        ProgressBar().attach(trainer, output_transform=lambda loss: {"train_loss": loss})
        logger = TensorboardLogger(log_dir=task.folder)
        logger.attach_output_handler(
            trainer,
            event_name=Events.ITERATION_COMPLETED(every=LOG_EVERY),
            tag="training",
            output_transform=lambda loss: {"train_loss": loss},
        )
        saver = DiskSaver(task.folder, create_dir=True, require_empty=False)
        checkpoint = Checkpoint({"net": net, "optimizer": optimizer}, saver, n_saved=1)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    if task.val is not None:
        metrics = {"accuracy": Accuracy(), "loss": Loss(nn.functional.cross_entropy)}
        evaluator = create_supervised_evaluator(net, metrics)

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate() -> None:
            evaluator.run(task.val)
            task.accuracy = evaluator.state.metrics["accuracy"]

    trainer.run(task.batches, max_epochs=task.epochs)
    if task.logs:
        logger.close()

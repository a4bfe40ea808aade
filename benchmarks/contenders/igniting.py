"""PyTorch Ignite: an `Engine` runs the user's step, and handlers do the rest."""

from __future__ import annotations

from epochs import Epochs
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, ProgressBar, TensorboardLogger
from ignite.metrics import Accuracy, Loss
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


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    optimizer, loss = work.optimizer(work.net.parameters()), nn.CrossEntropyLoss()
    trainer = create_supervised_trainer(work.net, optimizer, loss)
    evaluator = create_supervised_evaluator(work.net, {"accuracy": Accuracy(), "loss": Loss(loss)})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(work.val))
    trainer.run(work.train, max_epochs=work.epochs)
    return float(evaluator.state.metrics["accuracy"])

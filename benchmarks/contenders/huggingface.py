"""The Trainer of Hugging Face's transformers, on any module."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from contenders.task import LOG_EVERY, Task, loss_of, optimizer_of


class Raced(Trainer):
    """Reads the loaders that are given, as they are."""

    task: Task

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of the task."""
        return self.task.batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The validation loader of the task."""
        return self.task.val

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss of a batch."""
        self.task.tick()
        return loss_of(model, inputs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss, scores and labels of a validation batch."""
        images, labels = inputs
        scores = model(images)
        return nn.functional.cross_entropy(scores, labels), scores, labels


def accuracy(predicted: Any) -> dict[str, float]:
    """Accuracy over the validation set."""
    return {"acc": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def run(task: Task) -> None:
    """Train."""
    arguments = TrainingArguments(
        output_dir=task.folder,
        num_train_epochs=task.epochs,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=["tensorboard"] if task.logs else [],
        logging_strategy="steps" if task.logs else "no",
        logging_steps=LOG_EVERY,
        disable_tqdm=not task.logs,
        save_strategy="epoch" if task.logs else "no",
        save_total_limit=1,
        eval_strategy="no" if task.val is None else "epoch",
    )
    optimizer = optimizer_of(task.net.parameters())
    constant = LambdaLR(optimizer, lambda step: 1.0)
    trainer = Raced(task.net, arguments, compute_metrics=accuracy, optimizers=(optimizer, constant))
    trainer.task = task
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if task.val is not None:
        task.accuracy = next(row["eval_acc"] for row in reversed(trainer.state.log_history) if "eval_acc" in row)

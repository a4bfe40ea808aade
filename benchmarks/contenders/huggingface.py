"""The Trainer of Hugging Face's transformers. Its nets return their loss by themselves."""

from __future__ import annotations

from typing import Any

import torch
from epochs import Epochs
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, default_collate
from transformers import EvalPrediction, Trainer, TrainingArguments
from work import LOG_EVERY, Work


class Classifier(nn.Module):
    """A net in the form that the Trainer asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scores, and the loss."""
        scores = self.net(images)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Named:
    """Batches by the names of the net's arguments."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for images, labels in self.batches:
            yield {"images": images, "labels": labels}


class OnBatches(Trainer):
    """A Trainer with a loader of its own, as its documentation tells."""

    def __init__(self, batches: Any, **options: Any) -> None:
        super().__init__(**options)
        self.batches = batches

    def get_train_dataloader(self) -> Any:
        """The batches."""
        return self.batches


def train(work: Work) -> None:
    """Steps on batches."""
    net = Classifier(work.net)
    optimizer = work.optimizer(net.parameters())
    options: dict[str, Any] = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
    if work.realistic:
        options = {"report_to": "tensorboard", "logging_steps": LOG_EVERY, "save_total_limit": 1}
        options |= {"save_strategy": "steps", "save_steps": work.save_every}
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        use_cpu=True,
        max_steps=len(work.batches),
        max_grad_norm=0.0,
        disable_tqdm=not work.realistic,
        **options,
    )
    constant = LambdaLR(optimizer, lambda step: 1.0)
    OnBatches(Named(work.batches), model=net, args=arguments, optimizers=(optimizer, constant)).train()


def epochs(work: Epochs) -> float:
    """Training and validation; returns the accuracy."""
    net = Classifier(work.net)
    optimizer = work.optimizer(net.parameters())
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        use_cpu=True,
        num_train_epochs=work.epochs,
        per_device_train_batch_size=work.train.batch_size,
        per_device_eval_batch_size=work.val.batch_size,
        max_grad_norm=0.0,
        disable_tqdm=True,
        eval_strategy="epoch",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    )
    constant = LambdaLR(optimizer, lambda step: 1.0)
    trainer = OnLoader(
        work.train,
        model=net,
        args=arguments,
        eval_dataset=work.val.dataset,
        data_collator=by_name,
        compute_metrics=accuracy,
        optimizers=(optimizer, constant),
    )
    trainer.train()
    found = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    return float(found[-1])


class OnLoader(Trainer):
    """A Trainer that reads its samples in an order that is given."""

    def __init__(self, loader: DataLoader[Any], **options: Any) -> None:
        super().__init__(train_dataset=loader.dataset, **options)
        self.order = loader.sampler

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return self.order


def by_name(samples: list[Any]) -> dict[str, Tensor]:
    """Samples as a batch, by the names of the net's arguments; the datasets of the project make theirs themselves."""
    images, labels = samples if isinstance(samples[0], Tensor) else default_collate(samples)
    return {"images": images, "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`."""
    from torchmetrics.functional.classification import multiclass_accuracy

    scores, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    return {"accuracy": multiclass_accuracy(scores, labels, 10, average="micro").item()}

"""The Trainer of Hugging Face's transformers. Its nets return their loss by themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
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

"""MInterface: trains whichever net was named."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

import engine
from utils.metrics import classification_metrics
from utils.registry import build, load_class

# Net arguments that the dataset fills in unless they are given.
OFFERED = ("num_classes", "sample_shape")


class MInterface(engine.Module):
    """Trains a net of `model/` for classification.

    Override `configure_loss`, `configure_metrics`, `configure_optimizers` or the steps for other tasks.

    Args:
        model_name: Name of the net: a file in model/.
        lr: Learning rate at the start; it falls to zero along a cosine.
        weight_decay: Pull of the weights towards zero (AdamW).
        model: Arguments of the net.
    """

    net: nn.Module | None
    loss: nn.Module

    def __init__(
        self,
        model_name: str = "standard_net",
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        model: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0:
            raise engine.MisconfigurationException(
                f"lr={lr}, weight_decay={weight_decay}; give an lr above 0, a weight_decay from 0"
            )
        self.save_hyperparameters("model_name", "lr", "weight_decay")
        self.hparams["model"] = {name: value for name, value in (model or {}).items() if value is not None}
        self.net = None

    def configure_model(self) -> None:
        """Build the net, once the dataset can tell how many classes it has and what a sample looks like."""
        if self.net is not None:
            return
        name, arguments = self.hparams["model_name"], self.hparams["model"]
        accepted = inspect.signature(load_class("model", name)).parameters
        for argument in OFFERED:
            offered = getattr(self._trainer.datamodule, argument, None) if self._trainer is not None else None
            if argument not in arguments and offered is not None:
                arguments[argument] = tuple(offered) if argument == "sample_shape" else offered
            required = argument in accepted and accepted[argument].default is inspect.Parameter.empty
            if required and argument not in arguments:
                raise engine.MisconfigurationException(
                    f"net {name} needs {argument}, and the dataset does not tell: give its class an attribute of that "
                    f"name, or --model.{argument}"
                )
        unwanted = [argument for argument in OFFERED if argument not in accepted]
        self.net = build("model", name, {k: v for k, v in arguments.items() if k not in unwanted})
        self.loss = self.configure_loss()
        metrics = self.configure_metrics()
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")

    def configure_loss(self) -> nn.Module:
        """The loss of scores of shape (batch, num_classes) and labels of shape (batch,)."""
        return nn.CrossEntropyLoss()

    def configure_metrics(self) -> MetricCollection:
        """What to measure on validation and test sets."""
        num_classes = self.hparams["model"].get("num_classes")
        return MetricCollection({}) if num_classes is None else classification_metrics(num_classes)

    def configure_optimizers(self) -> Any:
        """AdamW, with a learning rate that falls to zero over the run (Loshchilov and Hutter 2017)."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return optimizer
        angle = math.pi / max(steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(angle * step)) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, inputs: Tensor) -> Tensor:
        """The net's output."""
        assert self.net is not None
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        loss: Tensor = self.loss(self(inputs), targets)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a validation batch."""
        self._evaluate(batch, "val_loss", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a test batch."""
        self._evaluate(batch, "test_loss", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities of shape (batch, num_classes); labels in the batch are left aside."""
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return self(inputs).softmax(dim=1)

    def _evaluate(self, batch: Any, loss_name: str, metrics: MetricCollection) -> None:
        inputs, targets = batch
        outputs = self(inputs)
        metrics.update(outputs, targets)
        self.log(loss_name, self.loss(outputs, targets), prog_bar=True, sync_dist=True)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("acc"))

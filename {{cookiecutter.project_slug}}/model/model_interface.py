"""MInterface: trains whichever net was named."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

import engine
from utils.acceleration import accelerate
from utils.batches import SoftLabels, TargetScale, check_labels, describe_data, explain, pair, take_description
from utils.fine_tuning import freeze, load_pretrained
from utils.losses import activate, align, build_losses
from utils.optimizers import build_optimizer, build_schedule
from utils.registry import build_net

Task = Literal["multiclass", "binary", "multilabel", "regression", "sequence"]
Schedule = Literal["constant", "cosine", "step", "multistep", "exponential", "onecycle", "plateau"]


class MInterface(engine.Module):
    """Trains a net of `model/`.

    Override `configure_loss`, `configure_metrics`, `configure_optimizers` or the steps where arguments do not reach.

    Args:
        model_name: Name of the net: a file in model/.
        task: What is learned; sequence: the next token at each position. Default: what the dataset says, or multiclass.
        loss: Losses of torch.nn. Default: the task's usual one.
        loss_args: Arguments of the loss, such as {label_smoothing: 0.1}; with several losses by loss.
        loss_weights: Weight of each loss in the sum. Default: 1.
        label_smoothing: Share of a label that is spread over all classes, in training.
        mixup: Blend pairs of images; parameter of the beta distribution, such as 0.2 (0: off).
        cutmix: Paste patches of other images; parameter of the beta distribution, such as 1 (0: off).
        metrics: Metrics of torchmetrics, or of utils/metrics.py. Default: the task's usual ones.
        metric_args: Arguments of metrics, by metric.
        optimizer: Optimizer of torch.optim.
        optimizer_args: Its further arguments, such as {momentum: 0.9}.
        lr: Learning rate: the highest of the run.
        lr_scales: Factors of the learning rate for parts of the net, by prefix of parameter names.
        weight_decay: Pull of the weights towards zero; biases and norms are left out.
        lr_schedule: How the learning rate changes over the run.
        lr_schedule_args: Its arguments, such as {step_size: 10, gamma: 0.1}, counted in epochs.
        warmup_steps: Optimizer steps over which the learning rate rises to lr.
        monitor: Logged value that decides which checkpoint is best (and what plateau watches).
        monitor_mode: Whether less or more of it is better. Default: known of losses and metrics by their names.
        freeze: Parts of the net to leave as they are: prefixes of parameter names; or all_but and the parts to train.
        pretrained: Weights to start from: a checkpoint, a file; for nets of a library also DEFAULT (downloads).
        compile: Compile the net, which takes a while at the start; checkpoints stay the same.
        channels_last: Keep the channels of a pixel side by side in memory, which convolutions on GPUs are faster with.
        model: Arguments of the net.
    """

    net: nn.Module | None
    loss: nn.Module

    def __init__(
        self,
        model_name: str = "standard_net",
        task: Task | None = None,
        loss: list[str] | None = None,
        loss_args: dict[str, Any] | None = None,
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        metrics: list[str] | None = None,
        metric_args: dict[str, Any] | None = None,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 3e-3,
        lr_scales: dict[str, float] | None = None,
        weight_decay: float = 0.01,
        lr_schedule: Schedule = "cosine",
        lr_schedule_args: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        monitor: str = "val_loss",
        monitor_mode: Literal["min", "max"] | None = None,
        freeze: list[str] | None = None,
        pretrained: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        model: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model = {name: value for name, value in (model or {}).items() if value is not None}
        self.save_hyperparameters()
        self.net = None
        self.frozen: list[nn.Module] = []
        # A collection for each validation and test set, made when the set is first seen.
        self.set_metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Build the net, once the dataset can tell how many classes it has and what a sample looks like."""
        from torchmetrics import MetricCollection  # takes longer than torch, and --help does without

        if self.net is not None:
            return
        given, data = self.hparams, getattr(self._trainer, "datamodule", None)
        tell = getattr(data, "tell", lambda attribute: None)
        given["task"] = given["task"] or tell("task") or "multiclass"
        given.update(describe_data(data, given))
        self.net = build_net(given["model_name"], given["model"], given["task"], tell)
        self.num_outputs = given["model"].get("num_classes")
        self.loss, metrics = self.configure_loss(), self.configure_metrics()
        self.metrics = metrics if isinstance(metrics, MetricCollection) else MetricCollection(metrics)
        self.scale = TargetScale(given["task"], data)
        softening = (given[name] for name in ("label_smoothing", "mixup", "cutmix"))
        self.soften = SoftLabels(given["task"], self.num_outputs, *softening)
        if given["pretrained"] is not None and self._trainer is not None:
            load_pretrained(self.net, given["pretrained"])
        self.frozen = freeze(self.net, given["freeze"]) if given["freeze"] else []
        accelerate(self.net, given["channels_last"], given["compile"], sharded=self.device_mesh is not None)

    def configure_loss(self) -> nn.Module:
        """A module that takes outputs and targets, as `align` gives them, and returns the loss."""
        return build_losses(*(self.hparams[name] for name in ("task", "loss", "loss_args", "loss_weights")))

    def configure_metrics(self) -> Any:
        """What to measure on a validation or test set: a MetricCollection, a metric, or a dict or list of metrics."""
        from utils.metrics import build_metrics

        given = self.hparams
        return build_metrics(given["task"], given["metrics"], given["metric_args"], self.num_outputs)

    def configure_optimizers(self) -> Any:
        """The optimizer, and what changes its learning rate over the run."""
        assert self.net is not None
        given, trainer = self.hparams, self.trainer
        wanted = ("optimizer", "lr", "weight_decay", "optimizer_args", "lr_scales")
        optimizer = build_optimizer(self.net, *(given[name] for name in wanted))
        warmup = 0 if trainer.fast_dev_run else given["warmup_steps"]
        schedule = {"name": given["lr_schedule"], "arguments": given["lr_schedule_args"], "warmup_steps": warmup}
        # In this order: Lightning reads the loader when it is asked for all steps, and knows an epoch's afterwards.
        span: dict[str, Any] = {"total_steps": trainer.estimated_stepping_batches}
        span["steps_per_epoch"] = trainer.num_training_batches / trainer.accumulate_grad_batches
        watched = {name: given[name] for name in ("monitor", "monitor_mode")}
        return [optimizer], build_schedule(optimizer, **schedule, **span, **watched)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the labels, while they are on the CPU."""
        if self.hparams["task"] in ("multiclass", "sequence"):
            check_labels(batch, self.num_outputs, (self.hparams["loss_args"] or {}).get("ignore_index", -100))
        return batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the data has the classes that were learned."""
        take_description(self.hparams, checkpoint["hyper_parameters"])
        self.scale.take_shape(checkpoint["state_dict"])

    def on_train_start(self) -> None:
        """Keep the batch norms of frozen parts from learning."""
        for part in self.frozen:
            part.eval()

    def forward(self, inputs: Any) -> Tensor:
        """The net's output."""
        assert self.net is not None
        with explain("the net", inputs=inputs):
            outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = self.soften(*pair(batch))
        outputs, targets = align(self.hparams["task"], self(inputs), targets)
        return self._log_loss("train", outputs, targets, on_step=True, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Loss and metrics of a validation batch."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Loss and metrics of a test batch."""
        return self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities, or values in a regression; targets in the batch are left aside."""
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return self.scale.restore(activate(self.hparams["task"], self(inputs)))

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> dict[str, Tensor]:
        inputs, targets = pair(batch)
        outputs, targets = align(self.hparams["task"], self(inputs), targets)
        self._log_loss(stage, outputs, targets)
        if (key := f"{stage}{dataloader_idx}") not in self.set_metrics:
            self.set_metrics[key] = self.metrics.clone(prefix=f"{stage}_").to(outputs.device)
        chosen: Any = self.set_metrics[key]
        with explain("a metric", outputs=outputs, targets=targets):
            chosen.update(self.scale.restore(outputs), targets)
        for own, (name, metric) in zip(chosen.keys(keep_base=True), chosen.items(copy_state=False), strict=True):
            self.log(name, metric, prog_bar=name.endswith("_acc"), metric_attribute=f"set_metrics.{key}.{own}")
        return {"outputs": outputs, "targets": targets}

    def _log_loss(self, stage: str, outputs: Tensor, targets: Tensor, **when: Any) -> Tensor:
        loss: Tensor = self.loss(outputs, self.scale(targets))
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True, **when)
        for name, value in getattr(self.loss, "terms", {}).items():
            self.log(f"{stage}_{name}", value, sync_dist=True, **when)
        return loss

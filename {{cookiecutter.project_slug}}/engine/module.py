"""Module: a network with its steps and its optimisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.distributed import all_gather_tensor, average_gradients, is_rank_zero, local_rank, rank, rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.export import ExportMixin
from engine.fsdp import clip_grad_norm
from engine.hooks import DataHooks, ModelHooks, convert
from engine.hparams import HyperparametersMixin
from engine.kinds import is_collection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torchmetrics import Metric

    from engine.callback import Callback
    from engine.trainer import Trainer


class Module(HyperparametersMixin, ExportMixin, ModelHooks, DataHooks, nn.Module):
    """What to train: override the steps and `configure_optimizers`, and any hook you need.

    Within a run, `self.trainer` is the trainer, `self.device` the device of the parameters.
    """

    # Whether checkpoints must fit the module name by name.
    strict_loading: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None
        self._toggled: dict[Tensor, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy, of weights for an average, say, takes neither the trainer along nor what was compiled.
        return {**super().__getstate__(), "_trainer": None}  # type: ignore[no-untyped-call]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any] | None:
        """Compute the loss of one batch; without automatic optimization, compute gradients and step optimizers, too.

        Args:
            batch: What the train loader yielded, on the device.
            batch_idx: Number of the batch in the epoch, from 0.

        Returns:
            The loss (a scalar with gradient), a mapping that has it as "loss", or None to skip the batch.
        """
        raise MisconfigurationException(f"{type(self).__name__} has no training_step; write one to call fit")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Evaluate one validation batch; with several loaders a `dataloader_idx` follows. Log metrics here."""
        raise MisconfigurationException(f"{type(self).__name__} has no validation_step; write one to validate")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Evaluate one test batch; with several loaders a `dataloader_idx` follows. Log metrics here."""
        raise MisconfigurationException(f"{type(self).__name__} has no test_step; write one to test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What to return for one batch of `Trainer.predict`; by default `self(batch)`."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """Return an optimizer, or an optimizer and schedulers; see `engine.optim.parse_optimizers`."""
        raise MisconfigurationException(f"{type(self).__name__} has no configure_optimizers; write one to call fit")

    def configure_callbacks(self) -> Callback | list[Callback]:
        """Callbacks that belong to this model; they replace the trainer's of the same type."""
        return []

    def configure_model(self) -> None:
        """Build large or data-dependent parts; called in every stage, so do nothing the second time."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
    ) -> None:
        """Clip gradients (unscaled, before the optimizer steps); by default as the trainer was told."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
    ) -> None:
        """Limit gradients in place: their total 2-norm, or each element's size; None or 0 leaves them alone."""
        if gradient_clip_val:
            if not self.automatic_optimization:
                # What an optimizer does when it steps, which comes later.
                average_gradients([p for group in optimizer.param_groups for p in group["params"]])
            by_value = gradient_clip_algorithm == "value"
            clip = nn.utils.clip_grad_value_ if by_value else clip_grad_norm
            clip([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss in `training_step`, without automatic optimization."""
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward: set self.automatic_optimization = False in __init__, or return the loss instead"
            )
        if any(hasattr(arg, "param_groups") for arg in args):
            raise MisconfigurationException("manual_backward takes no optimizer any more; write manual_backward(loss)")
        self.trainer.backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Update the weights; the closure runs `training_step` and computes the gradients."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients."""
        optimizer.zero_grad()

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Leave gradients to the parameters of this optimizer, until `untoggle_optimizer`."""
        kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
        of_all = [p for o in self.trainer.optimizers for group in o.param_groups for p in group["params"]]
        self._toggled = self._toggled or {p: p.requires_grad for p in of_all}
        for parameter, required in self._toggled.items():
            parameter.requires_grad = required and id(parameter) in kept

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Give every parameter the gradients again that it had before `toggle_optimizer`."""
        for parameter, required in self._toggled.items():
            parameter.requires_grad = required
        self._toggled = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """Around computing the loss of one of several optimizers."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def freeze(self) -> Self:
        """Train no parameter, and go to evaluation mode."""
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> Self:
        """Train every parameter."""
        return self.requires_grad_(True).train()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, in one process only."""
        if is_rank_zero():
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """The tensors of all processes, with a first dimension for the processes where there are several.

        Args:
            data: A tensor, or a structure of tensors; the same shapes everywhere.
            group: A process group of `torch.distributed`; default: all processes.
            sync_grads: Let gradients flow to the other processes.
        """
        return convert(data, lambda tensor: all_gather_tensor(tensor, group, sync_grads))

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module.

        Raises:
            MisconfigurationException: No trainer does.
        """
        if self._trainer is None:
            raise MisconfigurationException(f"{type(self).__name__} is not attached to a Trainer yet")
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        # Around nn.Module.__setattr__: a trainer is no submodule.
        object.__setattr__(self, "_trainer", trainer)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU for a module without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def current_epoch(self) -> int:
        """Number of the epoch, from 0; 0 without a trainer."""
        return 0 if self._trainer is None else self._trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Completed optimizer steps; 0 without a trainer."""
        return 0 if self._trainer is None else self._trainer.global_step

    @property
    def logger(self) -> Any:
        """The trainer's first logger, or None."""
        return None if self._trainer is None else self._trainer.logger

    @property
    def loggers(self) -> list[Any]:
        """The trainer's loggers."""
        return [] if self._trainer is None else self._trainer.loggers

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The processes as a grid of "data_parallel" and "tensor_parallel", where parameters are spread over them."""
        return None if self._trainer is None else getattr(self._trainer, "device_mesh", None)

    @property
    def global_rank(self) -> int:
        """Number of this process; 0 without a launcher."""
        return rank()

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return local_rank()

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the parameters; torch's default for a module without any."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on a GPU of CUDA."""
        return self.device.type == "cuda"

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or a list of them where there are several.

        Args:
            use_pl_optimizer: With the hooks of the engine around `step`; otherwise torch's own.
        """
        found = self.trainer.lightning_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """The scheduler, a list of them where there are several, or None."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return schedulers if len(schedulers) > 1 else next(iter(schedulers), None)

    def log(
        self,
        name: str,
        value: Tensor | float | Metric,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one value; nothing waits for the device.

        Args:
            name: Where both `on_step` and `on_epoch` are on, `_step` and `_epoch` are put behind it.
            value: A number, a tensor of one element, or a torchmetrics object (its `compute()` gives the epoch's
                value, and it is reset afterwards).
            prog_bar: Show it in the progress bar.
            logger: Hand it to the loggers; default: yes.
            on_step: Log the value of single steps; default: in training steps and batch hooks.
            on_epoch: Log the value of the whole epoch; default: everywhere else.
            reduce_fx: How an epoch's values become one: "mean" (weighted by batch size), "sum", "min" or "max".
            enable_graph: Not supported: what is logged has no gradient.
            sync_dist: Reduce over all processes (not the single steps of an evaluation); otherwise rank 0's counts.
            add_dataloader_idx: With several evaluation loaders, put the loader's number behind the name.
            batch_size: Weight in the mean; default: first dimension of the first tensor in the batch.
            metric_attribute: Where the module has the torchmetrics object; found without it, and checked with it.
            rank_zero_only: The value is that of the first process alone.
            sync_dist_group: Not supported: values are reduced over all processes.

        Raises:
            MisconfigurationException: Logging is not possible here, or the value or options make no sense.
        """
        if self._trainer is None or self._trainer.barebones:
            without = "without a Trainer" if self._trainer is None else "with barebones=True"
            rank_zero_warn(f"self.log({name!r}, ...) does nothing {without}")
            return
        if enable_graph:
            raise MisconfigurationException(f"self.log({name!r}, enable_graph=True): leave it out; values are detached")
        if sync_dist_group is not None:
            raise MisconfigurationException(
                f"self.log({name!r}, sync_dist_group=...): leave it out; all processes count"
            )
        if metric_attribute is not None:
            parts = metric_attribute.split(".")
            if reduce(lambda part, attribute: getattr(part, attribute, None), parts, cast(Any, self)) is not value:
                raise MisconfigurationException(f"self.log({name!r}): the metric is not self.{metric_attribute}")
        if rank_zero_only and not is_rank_zero():
            return
        # A plain tuple, made in every step, takes a tenth of the time.
        options = (on_step, on_epoch, prog_bar, logger is not False, reduce_fx, sync_dist and not rank_zero_only)
        self._trainer.metrics.log(name, value, options, batch_size, add_dataloader_idx)

    def log_dict(
        self,
        dictionary: Mapping[str, Tensor | float | Metric],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        sync_dist: bool = False,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Log every item of a mapping or of a torchmetrics `MetricCollection`; options as in `log`."""
        options |= {"prog_bar": prog_bar, "logger": logger, "on_step": on_step, "on_epoch": on_epoch}
        options |= {"reduce_fx": reduce_fx, "sync_dist": sync_dist, "batch_size": batch_size}
        # Members of a collection share their states, which are not to be copied for every batch.
        for name, value in dictionary.items(**({"copy_state": False} if is_collection(dictionary) else {})):
            self.log(name, value, add_dataloader_idx=add_dataloader_idx, **options)

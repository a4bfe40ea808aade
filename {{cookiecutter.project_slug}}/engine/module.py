"""Module: a network with its steps and its optimisation. DataModule: where the data comes from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from engine import checkpoint as checkpoints
from engine.distributed import rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks, ModelHooks
from engine.metrics import LogOptions

if TYPE_CHECKING:
    from engine.callback import Callback
    from engine.trainer import Trainer


class Hyperparameters(dict[str, Any]):
    """A dict whose items can also be read and set as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {name!r}; there are: {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class HyperparametersMixin:
    """`save_hyperparameters` and `hparams`, for modules and data modules."""

    @property
    def hparams(self) -> Hyperparameters:
        """The arguments kept by `save_hyperparameters`; they are saved in every checkpoint."""
        hparams: Hyperparameters = self.__dict__.setdefault("_hparams", Hyperparameters())
        return hparams

    def save_hyperparameters(self, *names: str, ignore: str | list[str] | None = None) -> None:
        """Keep the arguments of the calling `__init__` (all, or those named) in `hparams`.

        Args:
            *names: Arguments to keep; none means all.
            ignore: Arguments to leave out.
        """
        caller = inspect.currentframe()
        assert caller is not None and caller.f_back is not None
        names_in_order, _, kwargs, values = inspect.getargvalues(caller.f_back)
        arguments = {name: values[name] for name in names_in_order if name not in ("self", "__class__")}
        arguments |= values[kwargs] if kwargs else {}
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        for name in names:
            if name not in arguments:
                raise MisconfigurationException(
                    f"save_hyperparameters({name!r}): __init__ has no such argument; it has {', '.join(arguments)}"
                )
        for name in names or arguments:
            if name in ignored:
                continue
            try:
                self.hparams[name] = checkpoints.plain(arguments[name], name)
            except MisconfigurationException as error:
                rank_zero_warn(f"hyper-parameter {error}. Silence this with save_hyperparameters(ignore=[{name!r}])")


class Module(HyperparametersMixin, ModelHooks, DataHooks, nn.Module):
    """What to train: override the steps and `configure_optimizers`, and any hook you need.

    Within a run, `self.trainer` is the trainer, `self.device` the device of the parameters.
    """

    automatic_optimization: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, of weights for an average, say, does not take the trainer along.
        return {**self.__dict__, "_trainer": None}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any] | None:
        """Compute the loss of one batch.

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
            by_value = gradient_clip_algorithm == "value"
            clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
            clip([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)

    def backward(self, loss: Tensor) -> None:
        """Differentiate the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients."""
        optimizer.zero_grad()

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

    def optimizers(self) -> Optimizer:
        """The optimizer."""
        return self.trainer.optimizers[0]

    def lr_schedulers(self) -> Any:
        """The scheduler, a list of them where there are several, or None."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return schedulers if len(schedulers) > 1 else next(iter(schedulers), None)

    def log(
        self,
        name: str,
        value: Tensor | float | Metric,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        sync_dist: bool = False,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
    ) -> None:
        """Log one value; nothing waits for the device.

        Args:
            name: Where both `on_step` and `on_epoch` are on, `_step` and `_epoch` are put behind it.
            value: A number, a tensor of one element, or a torchmetrics object (its `compute()` gives the epoch's
                value, and it is reset afterwards).
            prog_bar: Show it in the progress bar.
            logger: Hand it to the loggers.
            on_step: Log the value of single steps; default: in training steps and batch hooks.
            on_epoch: Log the value of the whole epoch; default: everywhere else.
            reduce_fx: How an epoch's values become one: "mean" (weighted by batch size), "sum", "min" or "max".
            sync_dist: Reduce over all processes (not the single steps of an evaluation); otherwise rank 0's counts.
            add_dataloader_idx: With several evaluation loaders, put the loader's number behind the name.
            batch_size: Weight in the mean; default: first dimension of the first tensor in the batch.

        Raises:
            MisconfigurationException: Logging is not possible here, or the value or options make no sense.
        """
        if self._trainer is None:
            rank_zero_warn(f"self.log({name!r}, ...) does nothing without a Trainer")
            return
        options = LogOptions(on_step, on_epoch, prog_bar, logger, reduce_fx, sync_dist)
        self._trainer.metrics.log(name, value, options, batch_size, add_dataloader_idx)

    def log_dict(self, dictionary: Mapping[str, Tensor | float | Metric], **options: Any) -> None:
        """Log every item of a mapping or of a torchmetrics `MetricCollection`; options as in `log`."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | os.PathLike[str], map_location: torch.device | str = "cpu", **overrides: Any
    ) -> Self:
        """Build the module from the hyper-parameters in a checkpoint and load its weights.

        Args:
            checkpoint_path: A file that a trainer saved.
            map_location: Device to put it on.
            **overrides: Arguments of `__init__` that replace the saved ones.

        Raises:
            MisconfigurationException: The file is missing or damaged, or its weights do not fit.
        """
        loaded = checkpoints.load(Path(checkpoint_path))
        accepted = inspect.signature(cls.__init__).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        given = {name: value for name, value in loaded["hyper_parameters"].items() if name != "self"}
        with checkpoints.fitting(checkpoint_path, "hyper_parameters"):
            saved = {name: value for name, value in given.items() if takes_any or name in accepted}
            module = cls(**{**saved, **overrides})
            module.hparams.update({name: value for name, value in given.items() if name not in overrides})
            module.configure_model()
            module.on_load_checkpoint(loaded)
        checkpoints.load_weights(module, loaded["state_dict"], checkpoint_path)
        return module.to(map_location)


class DataModule(HyperparametersMixin, DataHooks):
    """Where the data comes from: override the loaders, `prepare_data` and `setup`."""

    trainer: Trainer | None = None

    def setup(self, stage: str) -> None:
        """Build the datasets for "fit", "validate", "test" or "predict", in every process."""

    def teardown(self, stage: str) -> None:
        """A stage is over, also after an error."""

    def on_exception(self, exception: BaseException) -> None:
        """The run ends with an error or with Ctrl-C."""

    def state_dict(self) -> dict[str, Any]:
        """What to save in checkpoints, as primitives and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

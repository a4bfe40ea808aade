"""The Trainer's arguments: what they mean, and which values make sense, alone and together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from engine.callback import Callback
from engine.callbacks import with_defaults
from engine.checkpoint_writer import CheckpointWriter
from engine.exceptions import MisconfigurationException
from engine.hooks import is_overridden
from engine.loggers import DummyLogger, as_loggers
from engine.module import Module
from engine.older import refuse_arguments, refuse_values
from engine.precision import Precision, PrecisionAlias, PrecisionName
from engine.profilers import PassThroughProfiler, Profiler, make_profiler
from engine.seed import make_deterministic
from engine.signals import seconds_of
from engine.strategies import DDPStrategy, ModelParallelStrategy, check_devices, find_strategy, select_device

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Smallest value of each whole-number argument.
LEAST = {"max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "fast_dev_run": 0}
LEAST |= {"num_sanity_val_steps": -1, "reload_dataloaders_every_n_epochs": 0}
LEAST |= {"log_every_n_steps": 0, "accumulate_grad_batches": 1}
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


class TrainerArguments:
    """What a Trainer is told, as attributes."""

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        strategy: str | DDPStrategy | ModelParallelStrategy = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: PrecisionName | PrecisionAlias | Literal[16, 32, 64] | None = "32-true",
        logger: Any | Sequence[Any] | bool | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = 1.0,
        limit_val_batches: int | float | None = 1.0,
        limit_test_batches: int | float | None = 1.0,
        limit_predict_batches: int | float | None = 1.0,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = 1.0,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: str | Profiler | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        detect_nonfinite: Literal["raise", "warn", "off"] = "raise",
        async_save: bool = False,
        **older: Any,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "older")}
        refuse_arguments(type(self), older)
        refuse_values(**self.arguments)
        if barebones:
            what = {"logger": logger, "enable_checkpointing": enable_checkpointing, "profiler": profiler}
            what |= {"enable_progress_bar": enable_progress_bar, "enable_model_summary": enable_model_summary}
            what |= {"num_sanity_val_steps": num_sanity_val_steps, "log_every_n_steps": log_every_n_steps}
            check_barebones(**what, fast_dev_run=fast_dev_run, detect_anomaly=detect_anomaly)
        self.barebones, self.detect_anomaly, self.num_nodes = barebones, detect_anomaly, num_nodes
        self.fast_dev_run = int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run
        unlimited = 1000 if max_steps == -1 and max_time is None else -1
        self.max_epochs = unlimited if max_epochs is None else max_epochs
        self.min_epochs = min_epochs or int(min_epochs is None and bool(min_steps))
        self.max_steps, self.min_steps = max_steps, min_steps or 0
        self.limit_train_batches, self.limit_val_batches = _or(limit_train_batches, 1.0), _or(limit_val_batches, 1.0)
        self.limit_test_batches = _or(limit_test_batches, 1.0)
        self.limit_predict_batches = _or(limit_predict_batches, 1.0)
        self.val_check_interval, self.check_val_every_n_epoch = _or(val_check_interval, 1.0), check_val_every_n_epoch
        by_time = isinstance(val_check_interval, str | timedelta | dict)
        self.val_check_time = seconds_of(val_check_interval, "val_check_interval") if by_time else None
        self.num_sanity_val_steps = _or(num_sanity_val_steps, 0 if barebones else 2)
        self.log_every_n_steps = _or(log_every_n_steps, 0 if barebones else 50)
        self.overfit_batches, self.accumulate_grad_batches = overfit_batches, accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.max_seconds, self.detect_nonfinite = seconds_of(max_time), detect_nonfinite
        check_arguments(self)
        logger = _or(logger, not barebones)
        self._shorten()
        self.strategy_options = find_strategy(strategy)
        check_devices(devices, num_nodes)
        self.device = select_device(accelerator, devices)
        self.precision_plugin = Precision(precision, self.device)
        self.precision = self.precision_plugin.name
        check_sharded(self.strategy_options, self.precision, async_save)
        make_deterministic(deterministic, benchmark)
        self.inference_mode, self.use_distributed_sampler = inference_mode, use_distributed_sampler
        self.sync_batchnorm, self.profiler = sync_batchnorm, make_profiler(profiler) or PassThroughProfiler()
        self.log_dir: str | None = str(default_root_dir or ".")
        self.default_root_dir = self.log_dir
        self.loggers = as_loggers(logger, self.default_root_dir)
        if self.fast_dev_run and self.loggers:
            # Code that uses a logger is tried, too.
            self.loggers = [DummyLogger()]
        self.enable_autolog_hparams = enable_autolog_hparams
        self.writer = CheckpointWriter(async_save)
        on = (_or(flag, not barebones) for flag in (enable_checkpointing, enable_progress_bar, enable_model_summary))
        self.callbacks = with_defaults(callbacks, *on)
        self._begin()

    def _begin(self) -> None:
        """Get ready to run, now that the arguments are known."""
        raise NotImplementedError

    def _shorten(self) -> None:
        """Do less where a trial is asked for: fast_dev_run, overfit_batches."""
        if self.fast_dev_run:
            self.limit_train_batches = self.limit_val_batches = self.fast_dev_run
            self.limit_test_batches = self.limit_predict_batches = self.fast_dev_run
            self.max_steps, self.max_epochs, self.num_sanity_val_steps = self.fast_dev_run, 1, 0
            self.val_check_interval, self.check_val_every_n_epoch, self.val_check_time = 1.0, 1, None
        if self.overfit_batches:
            self.limit_train_batches = self.limit_val_batches = self.overfit_batches


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def check_arguments(t: TrainerArguments) -> None:
    """Refuse values out of range, and those that contradict each other.

    Raises:
        MisconfigurationException: The first one found.
    """
    for name, least in LEAST.items():
        _check_number(name, getattr(t, name), least)
    if t.check_val_every_n_epoch is not None:
        _check_number("check_val_every_n_epoch", t.check_val_every_n_epoch, 1)
    for name in LIMITS:
        limit = getattr(t, name)
        if type(limit) not in (int, float) or not 0 <= limit <= (1.0 if type(limit) is float else limit):
            raise MisconfigurationException(
                f"{name}={limit!r} makes no sense; give a number of batches, or a share from 0.0 to 1.0"
            )
    clip = t.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < 3e38):
        raise MisconfigurationException(f"gradient_clip_val={clip!r}; give a number from 0, or none")
    if t.gradient_clip_algorithm not in (None, "norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={t.gradient_clip_algorithm!r}; give norm or value")
    if t.detect_nonfinite not in ("raise", "warn", "off"):
        raise MisconfigurationException(f"detect_nonfinite={t.detect_nonfinite!r}; give raise, warn or off")
    if t.val_check_time is None:
        _check_validation(t)


def _check_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:
        raise MisconfigurationException(f"{name}={value!r} makes no sense; give a whole number from {least}")


def _check_validation(t: TrainerArguments) -> None:
    interval = t.val_check_interval
    if type(interval) is int:
        _check_number("val_check_interval", interval, 1)
    elif type(interval) is not float or not 0 < interval <= 1:
        raise MisconfigurationException(
            f"val_check_interval={interval!r}; give a number of training batches, a share of an epoch above 0.0 up to "
            "1.0, or a time such as 00:00:15:00"
        )
    elif t.check_val_every_n_epoch is None and interval != 1:
        raise MisconfigurationException(
            f"check_val_every_n_epoch=None counts batches across epochs: val_check_interval={interval} has to be a "
            "whole number of them, or a time"
        )


def check_sharded(strategy: DDPStrategy | ModelParallelStrategy, precision: str, async_save: bool) -> None:
    """Refuse what cannot be done with parameters in parts.

    Raises:
        MisconfigurationException: It was asked for.
    """
    if isinstance(strategy, DDPStrategy):
        return
    if precision.startswith("16-"):
        raise MisconfigurationException(
            f"precision={precision} with parameters in parts (strategy fsdp): fp16 needs a loss scale that all parts "
            "agree on; give precision bf16-mixed, or strategy ddp"
        )
    if async_save:
        raise MisconfigurationException("async_save copies whole models; leave it out with strategy fsdp")


def check_barebones(**wanted: Any) -> None:
    """Refuse what barebones turns off.

    Raises:
        MisconfigurationException: Something was asked for by name.
    """
    asked = [name for name, value in wanted.items() if value]
    if asked:
        raise MisconfigurationException(
            f"barebones=True turns off what costs time, but {', '.join(asked)} asks for it; leave out one of the two"
        )


def check_module(t: Trainer) -> None:
    """Refuse a module without what its stage needs, and what cannot be done for one that optimises by itself.

    Raises:
        MisconfigurationException: Something is missing, or the trainer was asked for what the module does itself.
    """
    module, name = t.module, type(t.module).__name__
    step = {"fit": "training_step", "validate": "validation_step", "test": "test_step"}.get(t.stage)
    needed = [step] if step else []
    needed += ["configure_optimizers"] if t.stage == "fit" else []
    for hook in needed:
        if not is_overridden(module, hook, Module):
            raise MisconfigurationException(f"{name} has no {hook}; write one to call {t.stage}")
    if t.stage != "fit" or module.automatic_optimization:
        return
    if t.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={t.gradient_clip_val} with automatic_optimization=False; call self.clip_gradients "
            "before optimizer.step() in training_step instead"
        )
    if t.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={t.accumulate_grad_batches} with automatic_optimization=False; call "
            "optimizer.step() every so many batches in training_step instead"
        )

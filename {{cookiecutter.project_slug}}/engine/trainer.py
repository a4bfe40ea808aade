"""Trainer: arguments, set-up and tear-down around the loops, and hook dispatch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine import checkpoint, distributed, faults, lifecycle, loops, resume
from engine.callback import Callback, Hook, P, Table, check_hook_names, is_overridden, override_table
from engine.callbacks import ModelCheckpoint, find_checkpoint, print_results, with_defaults
from engine.checkpoint import CheckpointWriter
from engine.data import Loaders, LoaderSet
from engine.exceptions import MisconfigurationException
from engine.loggers import Logger, as_loggers, log_hyperparams, make_folder
from engine.metrics import MetricStore
from engine.module import DataModule, Module
from engine.optim import LRSchedulerConfig, parse_optimizers
from engine.precision import Precision, PrecisionName
from engine.reading import UNKNOWN
from engine.seed import global_seed
from engine.signals import StopRequest, seconds_of
from engine.strategy import Strategy, check_devices, make_strategy, select_device


@final
class Trainer:
    """Runs a module: `fit`, `validate`, `test`, `predict`.

    Args:
        accelerator: Device: cuda, else mps, else cpu with auto.
        devices: Processes on this machine; auto takes as many as the launcher started.
        strategy: How several processes work together; auto is ddp.
        precision: Number format: 32-true, or autocast with bf16-mixed or 16-mixed.
        logger: A logger, several, True for a TensorBoardLogger, or False for none.
        callbacks: Callbacks, called in this order; checkpoint callbacks always come last.
        max_epochs: Stop after so many epochs; -1 for no limit, default 1000 unless max_steps or max_time is given.
        min_epochs: Train at least so many epochs, even when asked to stop.
        max_steps: Stop after so many optimizer steps; -1 for no limit.
        max_time: Stop, and save what is needed to go on, after days:hours:minutes:seconds of fit.
        min_steps: Take at least so many optimizer steps, even when asked to stop.
        limit_train_batches: Batches of an epoch: a number, or a share from 0.0 to 1.0.
        limit_val_batches: The same for each validation set; 0 turns validation off.
        limit_test_batches: The same for each test set.
        limit_predict_batches: The same for each set to predict.
        fast_dev_run: Try everything with so many batches (true: 1), without checkpoints and logs.
        check_val_every_n_epoch: Validate every so many epochs.
        num_sanity_val_steps: Validation batches to try before training; -1 for all.
        log_every_n_steps: Log the values of every so many optimizer steps.
        enable_checkpointing: Save checkpoints.
        enable_progress_bar: Show progress.
        enable_model_summary: Show the model's layers before training.
        accumulate_grad_batches: Add up the gradients of so many batches before each optimizer step.
        gradient_clip_val: Limit of the gradients; none leaves them alone.
        gradient_clip_algorithm: Clip the norm of all gradients, or the value of each.
        deterministic: Use deterministic kernels only, which may be slower.
        benchmark: Let cuDNN try kernels for the fastest; good where sizes stay the same.
        inference_mode: Evaluate in torch.inference_mode rather than torch.no_grad (never within fit).
        use_distributed_sampler: Share the samples of torch's default samplers among processes.
        detect_nonfinite: What to do about a loss that is NaN or infinite.
        async_save: Write checkpoints in the background while training goes on.
        default_root_dir: Folder for logs and checkpoints where no logger names one; default: here.

    Raises:
        MisconfigurationException: An argument is out of range, or the machine does not have what it asks for.
    """

    # What a run consists of; set by fit, validate, test and predict.
    module: Module
    datamodule: DataModule | None
    strategy: Strategy
    loaders: Loaders
    optimizers: list[Optimizer]
    lr_scheduler_configs: list[LRSchedulerConfig]
    step_takes_batch_idx: bool
    stage: str
    stop: StopRequest
    # Losses that nobody has looked at yet: (epoch, batch, step, loss).
    losses: list[tuple[int, int, int, Tensor]]
    # What has interrupted fit, of `engine.signals`; 0 for nothing.
    interruption: int
    # What a checkpoint that is saved during validation takes from before it.
    before_validation: dict[str, Any] | None
    # File and epoch from which training went on.
    resumed: tuple[Path, int] | None

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: int | Literal["auto"] = "auto",
        strategy: Literal["auto", "ddp"] = "auto",
        precision: PrecisionName = "32-true",
        logger: Logger | Sequence[Logger] | bool = True,
        callbacks: Callback | Sequence[Callback] | None = None,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        max_time: str | timedelta | None = None,
        min_steps: int | None = None,
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        limit_test_batches: int | float = 1.0,
        limit_predict_batches: int | float = 1.0,
        fast_dev_run: int | bool = False,
        check_val_every_n_epoch: int = 1,
        num_sanity_val_steps: int = 2,
        log_every_n_steps: int = 50,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        deterministic: bool = False,
        benchmark: bool = False,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        detect_nonfinite: Literal["raise", "warn", "off"] = "raise",
        async_save: bool = False,
        default_root_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.fast_dev_run = int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run
        unlimited = 1000 if max_steps == -1 and max_time is None else -1
        self.max_epochs = unlimited if max_epochs is None else max_epochs
        self.min_epochs, self.max_steps, self.min_steps = min_epochs or 0, max_steps, min_steps or 0
        limits = (limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches)
        self.limits = dict(zip(("train", "val", "test", "predict"), limits, strict=True))
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.num_sanity_val_steps = num_sanity_val_steps
        self.log_every_n_steps = log_every_n_steps
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.max_seconds, self.detect_nonfinite = seconds_of(max_time), detect_nonfinite
        lifecycle.check_arguments(self)
        if self.fast_dev_run:
            self.limits = dict.fromkeys(self.limits, self.fast_dev_run)
            self.max_epochs, self.num_sanity_val_steps, self.check_val_every_n_epoch, logger = 1, 0, 1, False
        check_devices(devices, strategy)
        self.device = select_device(accelerator)
        self.precision = precision
        self.precision_plugin = Precision(precision, self.device)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        if benchmark:
            torch.backends.cudnn.benchmark = True
        self.inference_mode, self.use_distributed_sampler = inference_mode, use_distributed_sampler
        self.default_root_dir = str(default_root_dir or ".")
        self.log_dir = self.default_root_dir
        self.loggers = as_loggers(logger, self.default_root_dir)

        self.state = loops.TrainState(seed=global_seed())
        self.metrics = MetricStore()
        # Values as last handed to the loggers, and as last shown.
        self.logged_metrics, self.progress_bar_metrics = self.metrics.logged, self.metrics.progress_bar
        self.stage = ""
        self.should_stop = self.sanity_checking = self.is_last_batch = False
        self.optimizers, self.lr_scheduler_configs = [], []
        self.transfer_hooks: list[Callable[..., Any]] = []
        self.evaluation_steps: Counter[tuple[str, str | None]] = Counter()
        self.writer = CheckpointWriter(async_save)
        enabled = (enable_checkpointing, enable_progress_bar, enable_model_summary)
        self.dispatch(with_defaults(callbacks, *enabled))

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Train.

        Args:
            model: What to train.
            train_dataloaders: A loader, or a data module; default: the `train_dataloader` hook.
            val_dataloaders: One loader, or several in a list or by name; default: the `val_dataloader` hook.
            datamodule: Where the hooks are looked for, before the model.
            ckpt_path: Continue from a file, from the "last" or "best" of this trainer's ModelCheckpoint, or "auto":
                from the newest file in its folder that is not damaged, if there is one.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step was finished, and a checkpoint saved.
            SystemExit: SIGTERM or SIGUSR1, likewise; code 143.
        """
        if val_dataloaders is not None and not is_overridden(model, "validation_step", Module):
            raise MisconfigurationException("val_dataloaders were given, but the model has no validation_step")
        given = {"train": train_dataloaders, "val": val_dataloaders}
        with lifecycle.run(self, "fit", model, datamodule, given):
            found = find_checkpoint(self, ckpt_path)
            resume.restore_weights(self, found)
            self.strategy = make_strategy(model, self.device)
            optimizer, self.lr_scheduler_configs = parse_optimizers(model.configure_optimizers())
            self.optimizers = [optimizer]
            loops.call_both(self, Callback.on_fit_start)
            if found is not None:
                resume.restore_training(self, *found)
                self.resumed = (found[0], self.state.epoch)
            with faults.writing_logs(self):
                log_hyperparams(self)
            model.zero_grad()
            if self.num_sanity_val_steps and self.validates and not self.state.batches_done:
                loops.sanity_check(self)
            if (inexact := self.loaders.train().inexact()) is not None:
                distributed.rank_zero_warn(inexact)
            if found is not None:
                resume.restore_running(self, *found)
            if self.num_training_batches and loops.stop_reason(self) is None:
                loops.fit_epochs(self)
            self.writer.wait()
            loops.call_both(self, Callback.on_fit_end)

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the validation loaders.

        Args:
            model: What to evaluate; default: the last one.
            dataloaders: As `val_dataloaders` in `fit`, or a data module; default: the `val_dataloader` hook.
            ckpt_path: Weights to load: a file, "best" or "last"; default: those the model has.
            verbose: Print the results.
            datamodule: Where the hooks are looked for, before the model.

        Returns:
            For each loader, the logged values of the epoch by name, and those of all loaders together.
        """
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the test loaders; arguments and result as in `validate`."""
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool = True,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> list[Any] | None:
        """Run `predict_step` over the predict loaders.

        Returns:
            What each batch gave, on the CPU (one list per loader where there are several); None if
            `return_predictions` is False.
        """
        with lifecycle.run(self, "predict", self._or_last(model), datamodule, {"predict": dataloaders}):
            resume.restore_weights(self, find_checkpoint(self, ckpt_path))
            predictions: list[Any] | None = [] if return_predictions else None
            loops.evaluate(self, "predict", predictions)
        return predictions[0] if predictions is not None and len(predictions) == 1 else predictions

    def save_checkpoint(self, filepath: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Write a checkpoint (schema: `engine.checkpoint`), complete when this returns; every process must call it."""
        path = Path(filepath)
        if distributed.is_rank_zero():
            make_folder(path.parent)
        # What is being written changes what callbacks know of their files.
        self.writer.wait()
        captured = resume.capture(self, weights_only)
        faults.check_weights(self, captured)
        if distributed.is_rank_zero():
            checkpoint.save(captured, path)
        distributed.barrier()

    def call(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` on every callback that overrides it, in list order."""
        for bound in self.overrides[hook.__name__]:
            bound(self, self.module, *args, **kwargs)

    def call_monitoring(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` on the callbacks that monitor, at the end of batches and epochs: after what was logged there."""
        for bound in self._late[hook.__name__]:
            bound(self, self.module, *args, **kwargs)

    @property
    def current_epoch(self) -> int:
        """Finished epochs: within an epoch its number from 0."""
        return self.state.epoch

    @property
    def global_step(self) -> int:
        """Completed optimizer steps."""
        return self.state.global_step

    @property
    def log_step(self) -> int:
        """Step that loggers are given: number of the last optimizer step, from 0."""
        return max(self.state.global_step - 1, 0)

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self.loggers[0] if self.loggers else None

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All logged values by name, as 0-d tensors: what callbacks may monitor."""
        return self.metrics.callback_metrics()

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first ModelCheckpoint."""
        return next((c for c in self.callbacks if isinstance(c, ModelCheckpoint)), None)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and talks."""
        return distributed.is_rank_zero()

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return distributed.world_size()

    @property
    def num_training_batches(self) -> int | float:
        """Batches of a training epoch, after `limit_train_batches`; inf if the loader does not know."""
        return self.loaders.train().count

    @property
    def validates(self) -> bool:
        """Whether fit validates: there is a `validation_step` and something to run it on."""
        has_step = is_overridden(self.module, "validation_step", Module)
        return has_step and any(self.evaluation_loaders("validation").counts)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run, for schedulers; inf if there is no limit."""
        known = self.max_epochs != -1 and self.num_training_batches != UNKNOWN
        per_epoch = math.ceil(self.num_training_batches / self.accumulate_grad_batches) if known else 0
        return min(
            per_epoch * self.max_epochs if known else math.inf, self.max_steps if self.max_steps != -1 else math.inf
        )

    def evaluation_loaders(self, stage: str) -> LoaderSet:
        """The prepared "validation", "test" or "predict" loaders, the batches to run of each, and their names."""
        sets = self.loaders.get("val" if stage == "validation" else stage)
        steps = self.num_sanity_val_steps if self.sanity_checking else -1
        return sets if steps == -1 else sets._replace(counts=[min(steps, count) for count in sets.counts])

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Hand values to all loggers, with the epoch."""
        if values and not self.sanity_checking:
            with faults.writing_logs(self):
                for logger in self.loggers:
                    logger.log_metrics({**values, "epoch": self.state.epoch}, step)

    def _evaluate(
        self, stage: str, model: Module | None, dataloaders: Any, ckpt_path: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        kind = {"validate": "val", "test": "test"}[stage]
        with lifecycle.run(self, stage, self._or_last(model), datamodule, {kind: dataloaders}):
            resume.restore_weights(self, find_checkpoint(self, ckpt_path))
            results = loops.evaluate(self, {"validate": "validation", "test": "test"}[stage])
        if verbose and distributed.is_rank_zero():
            print_results(stage, results, self.loaders.get(kind).names)
        return results

    def dispatch(self, callbacks: list[Callback]) -> None:
        """Keep the callbacks, and look up once which of them override which hook."""
        for callback in callbacks:
            check_hook_names(callback, Callback)
        keys = [c.state_key for c in callbacks if is_overridden(c, "state_dict", Callback)]
        if len(set(keys)) < len(keys):
            raise MisconfigurationException(f"callbacks would overwrite each other's state: {keys}; override state_key")
        # Checkpoints last: what they save of the other callbacks is then up to date.
        self.callbacks = sorted(callbacks, key=lambda callback: isinstance(callback, ModelCheckpoint))
        self.overrides: Table = override_table(self.callbacks)
        # Callbacks that monitor see the end of a batch or an epoch later than the others.
        self._late: Table = override_table([callback for callback in self.callbacks if callback.monitoring])
        others = override_table([callback for callback in self.callbacks if not callback.monitoring])
        self.overrides |= {name: others[name] for name in ("on_train_batch_end", "on_train_epoch_end")}

    def _or_last(self, model: Module | None) -> Module:
        if model is None and not hasattr(self, "module"):
            raise MisconfigurationException("no model was given, and this trainer has not run one before")
        return self.module if model is None else model

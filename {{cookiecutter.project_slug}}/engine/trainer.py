"""Trainer: arguments, set-up and tear-down around the loops, and hook dispatch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from engine import checkpoint, distributed, faults, lifecycle, loops, optimization, resume, shards
from engine.arguments import TrainerArguments
from engine.callback import Callback, Hook, P, Table, override_table
from engine.callbacks import Checkpoint, find_checkpoint, print_results
from engine.checkpoint import refuse_trust
from engine.data import Loaders
from engine.datamodule import DataModule
from engine.evaluation import call_both, evaluate
from engine.exceptions import MisconfigurationException
from engine.hook_checks import check_dataloader_idx, check_hooks
from engine.hooks import is_overridden
from engine.loggers import log_hyperparams, make_folder
from engine.metrics import MetricStore
from engine.module import Module
from engine.older import refuse_arguments
from engine.optim import LightningOptimizer
from engine.reading import UNKNOWN
from engine.seed import global_seed
from engine.signals import StopRequest
from engine.strategies import Strategy
from engine.trainer_properties import TrainerProperties


@final
class Trainer(TrainerArguments, TrainerProperties):
    """Runs a module: `fit`, `validate`, `test`, `predict`.

    Args:
        accelerator: Device: cuda, else mps, else cpu with auto.
        strategy: How several processes work together: auto, ddp, fsdp (parameters in parts), or an object.
        devices: Processes on this machine, or the GPUs to use; auto takes as many as the launcher started.
        num_nodes: Machines that take part.
        precision: Number format: 32-true; autocast with bf16-mixed or 16-mixed; all in 64-, bf16- or 16-true.
        logger: A logger, several, true for a TensorBoardLogger, or false for none. Default: true.
        callbacks: Callbacks, called in this order; checkpoint callbacks always come last.
        fast_dev_run: Try everything with so many batches (true: 1), without checkpoints and logs.
        max_epochs: Stop after so many epochs; -1 for no limit, default 1000 unless max_steps or max_time is given.
        min_epochs: Train at least so many epochs, even when asked to stop.
        max_steps: Stop after so many optimizer steps; -1 for no limit.
        min_steps: Take at least so many optimizer steps, even when asked to stop.
        max_time: Stop, and save what is needed to go on, after days:hours:minutes:seconds of fit.
        limit_train_batches: Batches of an epoch: a number, or a share from 0.0 to 1.0.
        limit_val_batches: The same for each validation set; 0 turns validation off.
        limit_test_batches: The same for each test set.
        limit_predict_batches: The same for each set to predict.
        overfit_batches: Train and validate on so many batches, a number or a share, always the same (0: all).
        val_check_interval: Validate so often in an epoch: a share of it, batches, or days:hours:minutes:seconds.
        check_val_every_n_epoch: Validate in every so many epochs; null counts val_check_interval across epochs.
        num_sanity_val_steps: Validation batches to try before training; -1 for all. Default: 2.
        log_every_n_steps: Log the values of every so many optimizer steps; 0 for none. Default: 50.
        enable_checkpointing: Save checkpoints. Default: true.
        enable_progress_bar: Show progress. Default: true.
        enable_model_summary: Show the model's layers before training. Default: true.
        accumulate_grad_batches: Add up the gradients of so many batches before each optimizer step.
        gradient_clip_val: Limit of the gradients; none leaves them alone.
        gradient_clip_algorithm: Clip the norm of all gradients, or the value of each. Default: norm.
        deterministic: Use deterministic kernels only, which may be slower; warn where there is none with warn.
        benchmark: Let cuDNN try kernels for the fastest; good where sizes stay the same.
        inference_mode: Evaluate in torch.inference_mode rather than torch.no_grad (never within fit).
        use_distributed_sampler: Share the samples of torch's default samplers among processes.
        profiler: Where the time goes: simple for a table, pytorch for a trace of torch.profiler, or a Profiler.
        detect_anomaly: Find the operation whose gradient is NaN; slow.
        barebones: Turn off everything that costs time beside the loop: logs, checkpoints, bar, sanity check.
        sync_batchnorm: Let batch norms of several processes, on GPUs, see the whole batch.
        reload_dataloaders_every_n_epochs: Ask for new loaders every so many epochs (0: never).
        default_root_dir: Folder for logs and checkpoints where no logger names one; default: here.
        enable_autolog_hparams: Hand the arguments of model and data to the loggers.
        detect_nonfinite: What to do about a loss that is NaN or infinite.
        async_save: Write checkpoints in the background while training goes on.
        **older: Arguments of older versions of Lightning, which are refused with what to write instead.

    Raises:
        MisconfigurationException: An argument is out of range, or the machine does not have what it asks for.
    """

    # What a run consists of; set by fit, validate, test and predict.
    datamodule: DataModule | None
    strategy: Strategy
    # The processes as a grid, where parameters are spread over them.
    device_mesh: DeviceMesh | None
    lightning_optimizers: list[LightningOptimizer]
    # Whether the optimizer, or the module's optimizer_step, runs training_step by itself.
    by_closure: bool
    # training_step, validation_step, ... and the hooks of the module that do something; names of all that do something.
    steps: dict[str, Callable[..., Any]]
    takes_batch_idx: dict[str, bool]
    module_hooks: dict[str, Callable[..., Any]]
    hooked: set[str]
    stop: StopRequest
    # Losses that nobody has looked at yet: (epoch, batch, step, loss).
    losses: list[tuple[int, int, int, Tensor]]
    # What a checkpoint that is saved during validation takes from before it.
    before_validation: dict[str, Any] | None
    # File and epoch from which training went on.
    resumed: tuple[Path, int] | None
    # Batches between validations within an epoch (inf: at its end); when the last one was, on the monotonic clock.
    val_check_batch: float
    last_validation: float
    _loaded_in_epoch: int

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **older: Any,
    ) -> None:
        """Train.

        Args:
            model: What to train.
            train_dataloaders: A loader, or a data module; default: the `train_dataloader` hook.
            val_dataloaders: One loader, or several in a list or by name; default: the `val_dataloader` hook.
            datamodule: Where the hooks are looked for, before the model.
            ckpt_path: Continue from a file, from the "last" or "best" of this trainer's ModelCheckpoint, or "auto":
                from the newest file in its folder that is not damaged, if there is one.
            weights_only: Lightning's argument. Files are always read without trusting them, so that False is refused.
            **older: Arguments of older versions of Lightning, which are refused with what to write instead.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step was finished, and a checkpoint saved.
            SystemExit: SIGTERM or SIGUSR1, likewise; code 143.
        """
        refuse_arguments(Trainer.fit, older)
        refuse_trust(weights_only)
        if val_dataloaders is not None and not is_overridden(model, "validation_step", Module):
            raise MisconfigurationException("val_dataloaders were given, but the model has no validation_step")
        given = {"train": train_dataloaders, "val": val_dataloaders}
        with lifecycle.run(self, "fit", model, datamodule, given):
            found = self._find(ckpt_path)
            resume.restore_weights(self, found)
            lifecycle.prepare_training(self)
            call_both(self, Callback.on_fit_start)
            self._log_hyperparams()
            if found is not None:
                resume.restore_training(self, *found)
                self.resumed = (found[0], self.state.epoch)
            model.zero_grad()
            if self.num_sanity_val_steps and self.enable_validation and not self.state.batches_done:
                loops.sanity_check(self)
            self.loaders.check_lengths()
            if (inexact := self.loaders.train().inexact()) is not None:
                distributed.rank_zero_warn(inexact)
            if found is not None:
                resume.restore_running(self, *found)
            if self.num_training_batches and loops.stop_reason(self) is None:
                if self.enable_validation:
                    check_dataloader_idx(self, "validation")
                loops.fit_epochs(self)
            self.writer.wait()
            call_both(self, Callback.on_fit_end)

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
        **older: Any,
    ) -> list[dict[str, float]]:
        """Evaluate on the validation loaders.

        Args:
            model: What to evaluate; default: the last one, with the weights of its best checkpoint.
            dataloaders: As `val_dataloaders` in `fit`, or a data module; default: the `val_dataloader` hook.
            ckpt_path: Weights to load: a file, "best" or "last"; default: those the model has.
            verbose: Print the results.
            datamodule: Where the hooks are looked for, before the model.
            weights_only: As in `fit`.
            **older: As in `fit`.

        Returns:
            For each loader, the logged values of the epoch by name, and those of all loaders together.
        """
        refuse_arguments(Trainer.validate, older)
        refuse_trust(weights_only)
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
        **older: Any,
    ) -> list[dict[str, float]]:
        """Evaluate on the test loaders; arguments and result as in `validate`."""
        refuse_arguments(Trainer.test, older)
        refuse_trust(weights_only)
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **older: Any,
    ) -> list[Any] | None:
        """Run `predict_step` over the predict loaders.

        Args:
            model: What to run; default: the last one, with the weights of its best checkpoint.
            dataloaders: One loader, several or named ones, or a data module; default: the `predict_dataloader` hook.
            datamodule: Where the hooks are looked for, before the model.
            return_predictions: Keep what the steps return, and return it.
            ckpt_path: Weights to load.
            weights_only: As in `fit`.
            **older: As in `fit`.

        Returns:
            What each batch gave, on the CPU (one list per loader where there are several); None if
            `return_predictions` is False, or there is nothing to predict.
        """
        refuse_arguments(Trainer.predict, older)
        refuse_trust(weights_only)
        model, ckpt_path = self._or_last(model, ckpt_path)
        with lifecycle.run(self, "predict", model, datamodule, {"predict": dataloaders}):
            resume.restore_weights(self, self._find(ckpt_path))
            self._log_hyperparams()
            predictions: list[Any] | None = None if return_predictions is False else []
            evaluate(self, "predict", predictions)
        return predictions[0] if predictions and len(predictions) == 1 else predictions or None

    def save_checkpoint(self, filepath: str | os.PathLike[str], weights_only: bool | None = None) -> None:
        """Write a checkpoint (schema: `engine.checkpoint`), complete when this returns; every process must call it."""
        if self.model is None:
            raise MisconfigurationException("there is nothing to save: this trainer has run no model yet")
        path = Path(filepath)
        if distributed.is_rank_zero():
            make_folder(path.parent)
        # What is being written changes what callbacks know of their files.
        self.writer.wait()
        captured = resume.capture(self, bool(weights_only))
        faults.check_weights(self, captured)
        captured = shards.write(checkpoint.plain_checkpoint(captured), path.parent)
        if distributed.is_rank_zero():
            replaced = shards.named_in(path) if shards.FOLDER in captured else None
            checkpoint.save(captured, path)
            if replaced is not None:
                shards.tidy(path.parent, only=replaced)
        distributed.barrier()

    def call(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` on every callback that overrides it, in list order."""
        for bound in self.overrides[hook.__name__]:
            bound(self, self.module, *args, **kwargs)

    def call_monitoring(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` on the callbacks that monitor, at the end of batches and epochs: after what was logged there."""
        for bound in self.late[hook.__name__]:
            bound(self, self.module, *args, **kwargs)

    def log_metrics(self, values: dict[str, float], step: int, with_epoch: bool = True) -> None:
        """Hand values to all loggers, at the step that is logged as "step" or the one given; the epoch beside them."""
        if values and not self.sanity_checking:
            own_step = "step" in values
            numbers = {name: value for name, value in values.items() if name != "step"}
            numbers |= {"epoch": self.state.epoch} if with_epoch and not own_step else {}
            with faults.writing_logs(self):
                for logger in self.loggers:
                    logger.log_metrics(dict(numbers), int(values["step"]) if own_step else step)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a loss: what `Module.manual_backward` does."""
        optimization.backward(self, loss, *args, **kwargs)

    def step_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Update weights: what the `step` of `Module.optimizers` does."""
        return optimization.step_optimizer(self, optimizer, closure, **kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, in one process only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def _evaluate(
        self, stage: str, model: Module | None, dataloaders: Any, ckpt_path: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        kind = {"validate": "val", "test": "test"}[stage]
        model, ckpt_path = self._or_last(model, ckpt_path)
        with lifecycle.run(self, stage, model, datamodule, {kind: dataloaders}):
            resume.restore_weights(self, self._find(ckpt_path))
            self._log_hyperparams()
            results = evaluate(self, {"validate": "validation", "test": "test"}[stage])
        if verbose and distributed.is_rank_zero():
            print_results(stage, results, self.loaders.get(kind).names)
        return results

    def batches_between_validations(self) -> float:
        """Batches of training between validations, within an epoch or, if that was asked for, across epochs.

        Returns:
            A whole number, or inf for a validation at the end of an epoch; 1 where the clock is asked after each.

        Raises:
            MisconfigurationException: `val_check_interval` asks for more batches than an epoch has, or for a share of
                an unknown number.
        """
        interval, count = self.val_check_interval, self.num_training_batches
        if interval == 1.0 and type(interval) is float or self.val_check_time is not None:
            return math.inf if self.val_check_time is None else 1
        if type(interval) is int:
            if interval > count and self.check_val_every_n_epoch is not None and self.validates:
                raise MisconfigurationException(
                    f"val_check_interval={interval}, but an epoch has {count} batches; give fewer, or "
                    "check_val_every_n_epoch=None to count across epochs"
                )
            return interval
        if count == UNKNOWN:
            raise MisconfigurationException(
                f"val_check_interval={interval} of a train loader without length; give a number of batches or a time"
            )
        return max(1, int(count * float(interval)))

    def reload_dataloaders(self) -> None:
        """Ask for new loaders, if it is the epoch for it."""
        every = self.reload_dataloaders_every_n_epochs
        if every and self.state.epoch - self._loaded_in_epoch >= every:
            self._loaded_in_epoch = self.state.epoch - self.state.epoch % every
            self.loaders.request_again("train", "val")
            self.loaders.check_lengths()

    def dispatch(self, callbacks: list[Callback]) -> None:
        """Keep the callbacks, and look up once which of them override which hook."""
        for callback in callbacks:
            check_hooks(callback)
        keys = [c.state_key for c in callbacks if is_overridden(c, "state_dict", Callback)]
        if len(set(keys)) < len(keys):
            raise MisconfigurationException(f"callbacks would overwrite each other's state: {keys}; override state_key")
        # Checkpoints last: what they save of the other callbacks is then up to date.
        self.callbacks = sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))
        self.overrides: Table = override_table(self.callbacks)
        # Callbacks that monitor see the end of a batch or an epoch later than the others.
        self.late: Table = override_table([callback for callback in self.callbacks if callback.monitoring])
        others = override_table([callback for callback in self.callbacks if not callback.monitoring])
        self.overrides |= {name: others[name] for name in ("on_train_batch_end", "on_train_epoch_end")}
        self.hooked = lifecycle.find_hooked(self)

    def _or_last(self, model: Module | None, ckpt_path: Any) -> tuple[Module, Any]:
        """The module to evaluate; if none is given the last one, with its best weights."""
        if model is not None:
            return model, ckpt_path
        if not hasattr(self, "module"):
            raise MisconfigurationException("no model was given, and this trainer has not run one before")
        if ckpt_path is None and not (self.checkpoint_callback and self.checkpoint_callback.best_model_path):
            raise MisconfigurationException(
                "without a model, the best checkpoint of the last fit is evaluated, and there is none; give the model, "
                "or ckpt_path"
            )
        return self.module, ckpt_path or "best"

    def _log_hyperparams(self) -> None:
        if self.enable_autolog_hparams:
            with faults.writing_logs(self):
                log_hyperparams(self)

    def _begin(self) -> None:
        self.state = loops.TrainState(seed=global_seed())
        self.metrics = MetricStore()
        # Values as last handed to the loggers, and as last shown.
        self.logged_metrics, self.progress_bar_metrics = self.metrics.logged, self.metrics.progress_bar
        self.should_stop = self.sanity_checking = self.is_last_batch = False
        self.optimizers, self.lr_scheduler_configs, self.lightning_optimizers, self.transfer_hooks = [], [], [], []
        self.evaluation_steps: Counter[tuple[str, str | None]] = Counter()
        self.ckpt_path: str | None = None
        self._loaded_in_epoch = self.interruption = 0
        self.stage, self.datamodule, self.copy_stream, self.module_hooks = "", None, None, {}
        # Before a run there are none.
        self.loaders = Loaders([], {}, dict.fromkeys(("train", "val", "test", "predict"), 1.0), share=False)
        self.dispatch(self.callbacks)

    def _find(self, ckpt_path: str | os.PathLike[str] | None) -> tuple[Path, checkpoint.Checkpoint] | None:
        found = find_checkpoint(self, ckpt_path)
        self.ckpt_path = None if found is None else str(found[0])
        return found

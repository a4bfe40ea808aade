"""What models and callbacks may ask of a running trainer: read-only views of its state, under Lightning's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from engine import distributed
from engine.callback import Callback
from engine.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar
from engine.data import Loaders, LoaderSet
from engine.hooks import is_overridden
from engine.loggers import Logger
from engine.metrics import MetricStore
from engine.module import Module
from engine.optim import LRSchedulerConfig
from engine.precision import Precision
from engine.reading import UNKNOWN
from engine.signals import TERM

if TYPE_CHECKING:
    from engine.loops import TrainState


class TrainerProperties:
    """Read-only views of a trainer."""

    module: Module
    loaders: Loaders
    state: TrainState
    stage: str
    metrics: MetricStore
    loggers: list[Logger]
    callbacks: list[Callback]
    precision_plugin: Precision
    optimizers: list[Optimizer]
    lr_scheduler_configs: list[LRSchedulerConfig]
    # Before, during and after the way to the device; None where the default is.
    transfer_hooks: list[Callable[..., Any] | None]
    copy_stream: Any
    interruption: int
    sanity_checking: bool
    limit_val_batches: int | float
    max_epochs: int
    max_steps: int
    num_sanity_val_steps: int
    accumulate_grad_batches: int

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
        """Step that loggers are given: number, from 0, of the last batch after which an optimizer stepped."""
        return max(self.state.batches_that_stepped - 1, 0)

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
    def enable_validation(self) -> bool:
        """Whether fit is to validate: there is a `validation_step`, a loader or its hook, and no limit of 0."""
        has_step = is_overridden(self.module, "validation_step", Module)
        return has_step and bool(self.limit_val_batches) and self.loaders.offers("val")

    @property
    def validates(self) -> bool:
        """Whether fit validates: it is to, and the loaders, which are requested if need be, have batches."""
        return self.enable_validation and any(self.evaluation_loaders("validation").counts)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run, for schedulers; inf if there is no limit."""
        known = self.max_epochs != -1 and self.num_training_batches != UNKNOWN
        per_epoch = math.ceil(self.num_training_batches / self.accumulate_grad_batches) if known else 0
        limits = [(self.max_epochs * per_epoch, known), (self.max_steps, self.max_steps != -1)]
        return min((steps for steps, limited in limits if limited), default=math.inf)

    @property
    def model(self) -> Module | None:
        """The module that is run, or was last; None before."""
        return getattr(self, "module", None)

    lightning_module = model

    @property
    def training(self) -> bool:
        """Whether fit is training, rather than validating."""
        return self.stage == "fit" and self.metrics.stage == "train"

    @property
    def validating(self) -> bool:
        """Whether validation runs, within fit or on its own; not in the sanity check."""
        within_fit = self.stage == "fit" and self.metrics.stage == "validation"
        return (self.stage == "validate" or within_fit) and not self.sanity_checking

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self.stage == "test"

    @property
    def predicting(self) -> bool:
        """Whether a prediction runs."""
        return self.stage == "predict"

    @property
    def evaluating(self) -> bool:
        """Whether validation or a test runs."""
        return self.validating or self.testing

    @property
    def received_sigterm(self) -> bool:
        """Whether the run ends because of SIGTERM."""
        return self.interruption == TERM

    @property
    def interrupted(self) -> bool:
        """Whether the run ends because somebody outside has asked for it."""
        return bool(self.interruption)

    @property
    def scaler(self) -> Any:
        """What scales the loss under fp16; None otherwise."""
        return self.precision_plugin.scaler

    @property
    def global_rank(self) -> int:
        """Number of this process."""
        return distributed.rank()

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return distributed.local_rank()

    @property
    def node_rank(self) -> int:
        """Number of this machine."""
        return distributed.rank() // distributed.local_world_size()

    @property
    def num_devices(self) -> int:
        """Processes on this machine, each with a device of its own."""
        return distributed.local_world_size()

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """All callbacks that save checkpoints."""
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first EarlyStopping."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """All of them."""
        return [c for c in self.callbacks if isinstance(c, EarlyStopping)]

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """What shows progress."""
        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)

    @property
    def train_dataloader(self) -> Any:
        """The train loader, prepared; requested when first asked for. None before a run."""
        return self._loaders_as_given("train")

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or several in a list or by name; None without any."""
        return self._loaders_as_given("val")

    @property
    def test_dataloaders(self) -> Any:
        """The same of the test."""
        return self._loaders_as_given("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The same of the prediction."""
        return self._loaders_as_given("predict")

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches of each validation loader, after `limit_val_batches`; inf for one that does not know."""
        return self.loaders.get("val").counts

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Those of them that the sanity check runs."""
        steps = math.inf if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        return [min(steps, count) for count in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """The same of the test."""
        return self.loaders.get("test").counts

    @property
    def num_predict_batches(self) -> list[int | float]:
        """The same of the prediction."""
        return self.loaders.get("predict").counts

    def _loaders_as_given(self, kind: str) -> Any:
        sets = self.loaders.get(kind)
        loaders = [reader.loader for reader in sets.readers]
        if sets.names:
            return dict(zip(sets.names, loaders, strict=True))
        return loaders[0] if len(loaders) == 1 else loaders or None

    def evaluation_loaders(self, stage: str) -> LoaderSet:
        """The prepared "validation", "test" or "predict" loaders, the batches to run of each, and their names."""
        sets = self.loaders.get("val" if stage == "validation" else stage)
        return sets._replace(counts=self.num_sanity_val_batches) if self.sanity_checking else sets

"""LearningRateFinder: train a little at rising learning rates, and begin with the one that helped most (Smith 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine import distributed, loops, resume
from engine.callback import Callback
from engine.exceptions import MisconfigurationException
from engine.kinds import is_metric
from engine.metrics import MetricStore

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

# How much of the running mean of losses stays in each step.
BETA = 0.98


@dataclass
class LRFinder:
    """What a search has found.

    Attributes:
        mode: "exponential" or "linear".
        lr_min: First rate.
        lr_max: Last rate.
        num_training: Number of rates.
        results: "lr" and, smoothed, the "loss" of every step.
    """

    mode: str
    lr_min: float
    lr_max: float
    num_training: int
    results: dict[str, list[float]] = field(default_factory=lambda: {"lr": [], "loss": []})

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss fell fastest; None if there are too few steps.

        Args:
            skip_begin: Steps at the beginning that do not count.
            skip_end: Steps at the end that do not count.
        """
        losses = self.results["loss"]
        counting = [n for n in range(len(losses))[skip_begin : -skip_end or None] if math.isfinite(losses[n])]
        if len(counting) < 2:
            distributed.rank_zero_warn(
                f"{len(losses)} steps are too few to suggest a learning rate; give more num_training_steps"
            )
            return None
        loss, rate = (torch.tensor([self.results[name][n] for n in counting]) for name in ("loss", "lr"))
        return self.results["lr"][counting[int(torch.gradient(loss, spacing=[rate])[0].argmin())]]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw losses over rates with matplotlib, into `ax` or a new figure, which is returned.

        Args:
            suggest: Mark the suggestion.
            show: Show the figure.
            ax: Where to draw.
        """
        try:
            plt = import_module("matplotlib.pyplot")
        except ModuleNotFoundError as error:
            raise MisconfigurationException("plot needs matplotlib; run: pip install matplotlib") from error
        ax, results = plt.subplots()[1] if ax is None else ax, self.results
        ax.plot(results["lr"], results["loss"])
        ax.set(xlabel="Learning rate", ylabel="Loss", xscale="log" if self.mode == "exponential" else "linear")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot([rate], [results["loss"][results["lr"].index(rate)]], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure


class LearningRateFinder(Callback):
    """Searches for a learning rate before training, and leaves everything as it was but the rate.

    Args:
        min_lr: First rate to try.
        max_lr: Last rate to try.
        num_training_steps: Rates to try, each in one optimizer step.
        mode: "exponential" or "linear" steps between them.
        early_stop_threshold: Stop where the loss is so many times the best one; None for never.
        update_attr: Go on with the suggested rate: in the optimizer, and in the attribute of the module.
        attr_name: Name of that attribute, of the module or its hyper-parameters; default: lr or learning_rate.

    Attributes:
        optimal_lr: What was found: `.suggestion()`, `.plot()`, `.results`; None before.
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        if mode not in ("exponential", "linear"):
            raise MisconfigurationException(f"mode={mode!r}; give exponential or linear")
        if not 0 < min_lr < max_lr or type(num_training_steps) is not int or num_training_steps < 1:
            given = f"min_lr={min_lr}, max_lr={max_lr}, num_training_steps={num_training_steps}"
            raise MisconfigurationException(f"{given}; give 0 < min_lr < max_lr, and a number of steps from 1")
        self._search = (mode, min_lr, max_lr, num_training_steps)
        self._early_stop_threshold, self._update_attr, self._attr_name = early_stop_threshold, update_attr, attr_name
        self.optimal_lr: LRFinder | None = None
        self._has_rate = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """A run that goes on has its rate."""
        self._has_rate = trainer.stage == "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Search."""
        if not self._has_rate:
            self.lr_find(trainer, pl_module)
        self._has_rate = False

    def lr_find(self, trainer: Trainer, pl_module: Module) -> None:
        """Search; for callbacks that do so at other times, at the start of an epoch, say."""
        if trainer.fast_dev_run:
            distributed.rank_zero_warn("LearningRateFinder does nothing in a fast_dev_run")
            return
        name, holders = self._holders(trainer, pl_module) if self._update_attr else ("", [])
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise MisconfigurationException("LearningRateFinder needs automatic optimization with one optimizer")
        found = LRFinder(*self._search)
        with _everything_kept(trainer):
            trainer.dispatch([_Steps(found, self._early_stop_threshold)])
            trainer.max_steps, trainer.max_epochs, trainer.min_epochs, trainer.min_steps = found.num_training, -1, 0, 0
            trainer.loggers, trainer.lr_scheduler_configs, trainer.detect_nonfinite = [], [], "off"
            trainer.val_check_time, trainer.check_val_every_n_epoch = None, 2**62
            trainer.reload_dataloaders_every_n_epochs = 0
            loops.fit_epochs(trainer)
        found.results = distributed.broadcast(found.results)
        self.optimal_lr = found
        rate = found.suggestion() if self._update_attr else None
        if rate is not None:
            for holder in holders:
                setattr(holder, name, rate)
            for group in trainer.optimizers[0].param_groups:
                group |= {key: rate for key in ("lr", "initial_lr") if key in group}
            for scheduler in [config.scheduler for config in trainer.lr_scheduler_configs]:
                if hasattr(scheduler, "base_lrs"):
                    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)

    def _holders(self, trainer: Trainer, module: Module) -> tuple[str, list[Any]]:
        """The attribute, and what has it."""
        objects = [module, module.hparams, *([trainer.datamodule.hparams] if trainer.datamodule is not None else [])]
        for name in [self._attr_name] if self._attr_name else ["lr", "learning_rate"]:
            if having := [thing for thing in objects if hasattr(thing, name)]:
                return name, having
        names = self._attr_name or "lr or learning_rate"
        raise MisconfigurationException(
            f"LearningRateFinder: neither {type(module).__name__} nor its hparams have {names}; give attr_name, or "
            "update_attr=False"
        )


class _Steps(Callback):
    """Sets the rates and notes the losses."""

    def __init__(self, found: LRFinder, threshold: float | None) -> None:
        self.found, self.threshold = found, threshold
        self.mean = self.best = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, *args: Any, **kwargs: Any) -> None:
        found, done = self.found, trainer.global_step
        share = (done + 1) / found.num_training if done else 0.0
        rate = found.lr_min + share * (found.lr_max - found.lr_min)
        if found.mode == "exponential":
            rate = found.lr_min * (found.lr_max / found.lr_min) ** share
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        found.results["lr"][done:] = [rate]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        losses, step = self.found.results["loss"], trainer.global_step
        if len(losses) == step:
            return
        if "loss" not in outputs:
            losses.append(math.nan)
            return
        self.mean = BETA * self.mean + (1 - BETA) * float(outputs["loss"])
        smooth = self.mean / (1 - BETA ** (step + 1))
        if self.threshold is not None and step > 1 and smooth > self.threshold * self.best:
            trainer.should_stop = True
        trainer.should_stop = distributed.broadcast(trainer.should_stop)
        if smooth < self.best or step == 1:
            self.best = smooth
        losses.append(smooth)


@contextmanager
def _everything_kept(t: Trainer) -> Iterator[None]:
    """Around training that leaves no trace."""
    running, kept = deepcopy(resume.moment(t)), dict(vars(t))
    running["gradients"] = {}
    running |= {name: [running[name]] * t.world_size for name in resume.OF_EACH_PROCESS}
    tensors = {name: value.detach().to("cpu", copy=True) for name, value in _tensors(t.module).items()}
    loader = t.loaders.train().loader
    # Loaders, or their datasets, may keep a state of their own.
    parts: list[Any] = [part for part in (loader, getattr(loader, "dataset", None)) if hasattr(part, "load_state_dict")]
    stateful = [*t.optimizers, t.precision_plugin, *parts[:1]]
    states = [deepcopy(part.state_dict()) for part in stateful]
    t.state, t.metrics, t.losses = loops.TrainState(seed=t.state.seed), MetricStore(), []
    try:
        yield
    finally:
        vars(t).update(kept)
        for name, value in _tensors(t.module).items():
            value.data.copy_(tensors[name])
        t.module.zero_grad()
        for metric in [part for part in t.module.modules() if is_metric(part)]:
            metric.reset()
        for part, state in zip(stateful, states, strict=True):
            part.load_state_dict(state)
        resume.restore_running(t, Path(), {**running, "loggers": []})


def _tensors(module: Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}

"""Optimizers and learning-rate schedulers: what `configure_optimizers` may return, and when schedulers step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from engine.distributed import rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.hooks import ModelHooks, is_overridden
from engine.metrics import MetricStore

if TYPE_CHECKING:
    from engine.trainer import Trainer

_BY_HAND = "set self.automatic_optimization = False in __init__ and step them in training_step"
_RETURNS = (
    "return an optimizer, ([optimizers], [schedulers]), or "
    '{"optimizer": ..., "lr_scheduler": a scheduler or {"scheduler": ..., "interval": "epoch" | "step", ...}}'
)


class LightningOptimizer:
    """An optimizer as models are given it: its `step` runs the hooks of an optimizer step and scales gradients.

    It has the attributes of the optimizer, which is `optimizer`, and passes for an instance of its class.
    """

    def __init__(self, optimizer: Optimizer, trainer: Trainer) -> None:
        self.optimizer, self._trainer = optimizer, trainer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # So that schedulers, and isinstance, take it for the optimizer that it stands for.
        return type(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        # While it is copied, it has no optimizer yet.
        if name == "optimizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update the weights, after `closure`, if there is one, has computed the gradients."""
        if closure is not None and not callable(closure):
            raise MisconfigurationException(f"optimizer.step({closure!r}); give a function that computes the gradients")
        return self._trainer.step_optimizer(self.optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Compute gradients of this optimizer's parameters only; processes share them when it steps, in any case."""
        with self._trainer.module.toggled_optimizer(self):
            yield


class NoOptimizer(Optimizer):
    """Stands for `configure_optimizers` returning None: its steps run the closure and change nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {"lr": 0.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure."""
        return closure() if closure is not None else None


@dataclass
class LRSchedulerConfig:
    """A scheduler and when it steps.

    Attributes:
        scheduler: The scheduler: one of torch's, or any object that the module's `lr_scheduler_step` can step.
        interval: Step after every optimizer step, or at the end of an epoch.
        frequency: Step every so many intervals (optimizer steps or epochs).
        monitor: Logged name handed to a plateau scheduler.
        strict: Whether a missing `monitor` ends the run; otherwise the scheduler waits.
        name: What LearningRateMonitor calls it.
        reduce_on_plateau: Whether the scheduler is handed the logged value; default: if it is a ReduceLROnPlateau.
    """

    scheduler: Any
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None

    reduce_on_plateau: bool | None = None

    def __post_init__(self) -> None:
        if self.reduce_on_plateau is None:
            self.reduce_on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)


def parse_optimizers(returned: Any, module: ModelHooks) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Read what the `configure_optimizers` of a module returned.

    Raises:
        MisconfigurationException: It is of no known form, or holds several optimizers and the module does not
            optimise by itself (`automatic_optimization=False`).
    """
    if returned is None:
        rank_zero_warn("configure_optimizers returned None: this run has no optimizer, and changes no weights itself")
        returned = NoOptimizer()
    entries: list[tuple[Any, str | None]] = []
    if isinstance(returned, Mapping) or (_is_list(returned) and all(isinstance(r, Mapping) for r in returned)):
        optimizers = []
        for part in [returned] if isinstance(returned, Mapping) else returned:
            unknown = set(part) - {"optimizer", "lr_scheduler", "monitor"}
            if unknown or "optimizer" not in part:
                instead = _BY_HAND if "frequency" in unknown else _RETURNS
                raise MisconfigurationException(f"configure_optimizers returned a dict of {sorted(part)}; {instead}")
            optimizers.append(part["optimizer"])
            if part.get("lr_scheduler") is not None:
                entries.append((part["lr_scheduler"], part.get("monitor")))
    elif _is_list(returned) and len(returned) == 2 and not isinstance(returned[1], Optimizer):
        optimizers = list(returned[0]) if _is_list(returned[0]) else [returned[0]]
        entries = [(entry, None) for entry in (returned[1] if _is_list(returned[1]) else [returned[1]])]
    else:
        optimizers = list(returned) if _is_list(returned) else [returned]
    # Handed back by somebody who asked for them before.
    optimizers = [o.optimizer if type(o) is LightningOptimizer else o for o in optimizers]
    wrong = [type(o).__name__ for o in optimizers if not isinstance(o, Optimizer)]
    if not optimizers or wrong:
        raise MisconfigurationException(f"configure_optimizers returned {wrong[0] if wrong else 'nothing'}; {_RETURNS}")
    if len(optimizers) > 1 and module.automatic_optimization:
        raise MisconfigurationException(
            f"configure_optimizers returned {len(optimizers)} optimizers; {_BY_HAND}, or return one with several "
            "parameter groups"
        )
    return optimizers, [_parse_scheduler(entry, monitor, optimizers, module) for entry, monitor in entries]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _parse_scheduler(
    entry: Any, monitor: str | None, optimizers: list[Optimizer], module: ModelHooks
) -> LRSchedulerConfig:
    given = dict(entry) if isinstance(entry, Mapping) else {"scheduler": entry}
    if monitor is not None:
        given.setdefault("monitor", monitor)
    allowed = {f.name for f in fields(LRSchedulerConfig)}
    if set(given) - allowed or "scheduler" not in given:
        raise MisconfigurationException(
            f"a scheduler was given as {sorted(given)}; the keys are {sorted(allowed)}, 'scheduler' is required"
        )
    config = LRSchedulerConfig(**given)
    scheduler, kind = config.scheduler, type(config.scheduler).__name__
    by_module = is_overridden(module, "lr_scheduler_step", ModelHooks)
    if not by_module and not isinstance(scheduler, LRScheduler | ReduceLROnPlateau):
        raise MisconfigurationException(
            f"{kind} is no scheduler of torch.optim; write lr_scheduler_step(scheduler, metric), or {_RETURNS}"
        )
    if not all(hasattr(scheduler, name) for name in ("state_dict", "load_state_dict")):
        raise MisconfigurationException(f"{kind} has no state_dict and load_state_dict; a run could not be resumed")
    if config.interval not in ("epoch", "step"):
        raise MisconfigurationException(f"scheduler interval {config.interval!r}; give 'epoch' or 'step'")
    if type(config.frequency) is not int or config.frequency < 1:
        raise MisconfigurationException(f"scheduler frequency {config.frequency!r}; give a whole number from 1")
    if config.reduce_on_plateau and config.monitor is None and module.automatic_optimization:
        raise MisconfigurationException('ReduceLROnPlateau needs a value: {"scheduler": ..., "monitor": "val_loss"}')
    if isinstance(scheduler, OneCycleLR) and config.interval == "epoch" and module.automatic_optimization:
        rank_zero_warn('OneCycleLR steps once an epoch; most want {"scheduler": ..., "interval": "step"}')
    if getattr(scheduler, "optimizer", optimizers[0]) not in optimizers:
        raise MisconfigurationException("a scheduler belongs to an optimizer that configure_optimizers did not return")
    return config


def needs_closure(optimizer: Optimizer, scaled: bool) -> bool:
    """Whether an optimizer computes the gradients itself, by a closure, as LBFGS does.

    Raises:
        MisconfigurationException: It does, and gradients are scaled (fp16).
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs = isinstance(optimizer, LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty)
    if needs and scaled:
        raise MisconfigurationException(f"{type(optimizer).__name__} cannot scale gradients; use precision bf16-mixed")
    return needs


def step_schedulers(
    step: Callable[[Any, Tensor | None], None],
    configs: list[LRSchedulerConfig],
    unit: str,
    count: int,
    store: MetricStore | None = None,
) -> None:
    """Step schedulers after `count` units: those that follow the clock or, given a store, a value logged there.

    Args:
        step: Steps one, given the logged value or None: the module's `lr_scheduler_step`.
        configs: All schedulers.
        unit: "step" or "epoch".
        count: Optimizer steps or epochs so far.
        store: Where the values are that plateau schedulers follow.

    Raises:
        MisconfigurationException: A value was not logged, and the scheduler that follows it is strict.
    """
    for config in configs:
        if config.interval != unit or count % config.frequency or config.reduce_on_plateau != (store is not None):
            continue
        metrics: Any = {config.monitor: None} if store is None else store.callback_metrics()
        if config.monitor in metrics:
            step(config.scheduler, metrics[config.monitor])
            continue
        logged = ", ".join(sorted(metrics)) or "none"
        message = f"ReduceLROnPlateau watches {config.monitor!r}, which was not logged; logged are: {logged}"
        if config.strict:
            raise MisconfigurationException(message)
        rank_zero_warn(f"{message}; the learning rate stays")

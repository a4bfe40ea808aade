"""What `configure_optimizers` may return, and when learning-rate schedulers step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.exceptions import MisconfigurationException
from engine.metrics import MetricStore

_RETURNS = (
    "return an optimizer, ([optimizer], [scheduler]), or "
    '{"optimizer": ..., "lr_scheduler": a scheduler or {"scheduler": ..., "interval": "epoch" | "step", ...}}'
)


@dataclass
class LRSchedulerConfig:
    """A scheduler and when it steps.

    Attributes:
        scheduler: The scheduler.
        interval: Step after every optimizer step, or at the end of an epoch.
        frequency: Step every so many intervals (optimizer steps or epochs).
        monitor: Logged name handed to a plateau scheduler.
        strict: Whether a missing `monitor` ends the run; otherwise the scheduler waits.
        name: What LearningRateMonitor calls it.
    """

    scheduler: LRScheduler | ReduceLROnPlateau
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None

    @property
    def reduce_on_plateau(self) -> bool:
        """Whether the scheduler is driven by a logged value."""
        return isinstance(self.scheduler, ReduceLROnPlateau)


def parse_optimizers(returned: Any) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    """Read what `configure_optimizers` returned.

    Raises:
        MisconfigurationException: It is of no known form, or holds several optimizers.
    """
    monitor = None
    schedulers: Any = []
    if isinstance(returned, Mapping):
        if "optimizer" not in returned:
            raise MisconfigurationException(f"configure_optimizers returned a dict without 'optimizer'; {_RETURNS}")
        unknown = set(returned) - {"optimizer", "lr_scheduler", "monitor"}
        if unknown:
            raise MisconfigurationException(f"configure_optimizers returned unknown keys {sorted(unknown)}; {_RETURNS}")
        monitor = returned.get("monitor")
        schedulers = returned.get("lr_scheduler") or []
        returned = returned["optimizer"]
    elif isinstance(returned, tuple | list) and len(returned) == 2 and not isinstance(returned[1], Optimizer):
        returned, schedulers = returned
    optimizers = list(returned) if isinstance(returned, tuple | list) else [returned]
    if len(optimizers) == 1 and isinstance(optimizers[0], Mapping):
        return parse_optimizers(optimizers[0])
    if len(optimizers) > 1:
        raise MisconfigurationException(
            f"configure_optimizers returned {len(optimizers)} optimizers; one is supported, with as many parameter "
            "groups as you like"
        )
    if optimizers and isinstance(optimizers[0], LBFGS):
        raise MisconfigurationException("LBFGS evaluates the loss several times a step, which is not supported")
    if not optimizers or not isinstance(optimizers[0], Optimizer):
        kind = type(optimizers[0]).__name__ if optimizers else "an empty list"
        raise MisconfigurationException(f"configure_optimizers returned {kind}; {_RETURNS}")
    entries = schedulers if isinstance(schedulers, tuple | list) else [schedulers]
    return optimizers[0], [_parse_scheduler(entry, monitor, optimizers[0]) for entry in entries]


def _parse_scheduler(entry: Any, monitor: str | None, optimizer: Optimizer) -> LRSchedulerConfig:
    given = dict(entry) if isinstance(entry, Mapping) else {"scheduler": entry}
    if monitor is not None:
        given.setdefault("monitor", monitor)
    allowed = {f.name for f in fields(LRSchedulerConfig)}
    unknown = set(given) - allowed
    if unknown or "scheduler" not in given:
        raise MisconfigurationException(
            f"a scheduler was given as {sorted(given)}; the keys are {sorted(allowed)}, 'scheduler' is required"
        )
    config = LRSchedulerConfig(**given)
    if not isinstance(config.scheduler, LRScheduler | ReduceLROnPlateau):
        raise MisconfigurationException(f"{type(config.scheduler).__name__} is no scheduler of torch.optim; {_RETURNS}")
    if config.interval not in ("epoch", "step"):
        raise MisconfigurationException(f"scheduler interval {config.interval!r}; give 'epoch' or 'step'")
    if config.frequency < 1:
        raise MisconfigurationException(f"scheduler frequency {config.frequency}; give 1 or more")
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationException('ReduceLROnPlateau needs a value: {"scheduler": ..., "monitor": "val_loss"}')
    if config.scheduler.optimizer is not optimizer:
        raise MisconfigurationException("a scheduler belongs to an optimizer that configure_optimizers did not return")
    return config


def step_schedulers(configs: list[LRSchedulerConfig], unit: str, count: int, store: MetricStore | None = None) -> None:
    """Step schedulers after `count` units: those that follow the clock or, given a store, a value logged there.

    Raises:
        MisconfigurationException: A value was not logged, and the scheduler that follows it is strict.
    """
    for config in configs:
        if config.interval != unit or count % config.frequency or config.reduce_on_plateau != (store is not None):
            continue
        if store is None:
            config.scheduler.step()  # type: ignore[call-arg]  # the clock's schedulers take no metric
            continue
        metrics = store.callback_metrics()
        if config.monitor in store.fresh:
            config.scheduler.step(float(metrics[config.monitor]))  # type: ignore[arg-type]  # a value, not an epoch
        elif config.strict:
            raise MisconfigurationException(
                f"ReduceLROnPlateau watches {config.monitor!r}, which was not logged; logged are: "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )

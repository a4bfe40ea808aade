"""Running values of what is logged: how an epoch's values become one, over batches and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engine import distributed
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torchmetrics import Metric

Value = Tensor | float


class LogOptions(NamedTuple):
    """How a name is logged; the same for every call with that name in one scope. None stands for the default."""

    on_step: bool | None
    on_epoch: bool | None
    prog_bar: bool
    logger: bool
    reduce_fx: str | Callable[..., Any]
    sync_dist: bool


@dataclass(slots=True)
class Meter:
    """Running value of one logged name.

    Attributes:
        loader: What the evaluation loader is called, if there are several.
        last: The newest value, 0-d and detached, if logged on steps.
        total: Sum (weighted, for means), minimum or maximum since the epoch began, float64 where the device has it.
        weight: Number of samples behind `total`.
        metric: The torchmetrics object that was logged, which keeps the epoch's value itself.
        home: The loader in which it was first logged, whether its name says so or not; None outside loaders.
        given: The values of the options as they were first given, before defaults.
    """

    name: str
    loader: str | None
    options: LogOptions
    last: Value | None = None
    total: Value | None = None
    weight: float = 0.0
    metric: Metric | None = None
    home: str | None = None
    given: tuple[Any, ...] | None = None

    def label(self, suffix: str = "") -> str:
        """Full name; the suffix "_step" or "_epoch" counts only where both of these values are logged."""
        forked = self.options.on_step and self.options.on_epoch
        tail = "" if self.loader is None else f"/{self.loader}"
        return f"{self.name}{suffix if forked else ''}{tail}"

    def add(self, value: Value, weight: float) -> None:
        """Add one value to those of the epoch, in a mean one that stands for `weight` samples (1 elsewhere)."""
        self.weight += weight
        if self.total is None:
            self.total = _wide(value) * weight
        elif self.options.reduce_fx in ("min", "max"):
            self.total = extreme(self.options.reduce_fx, self.total, value)
        elif isinstance(self.total, Tensor) and isinstance(value, Tensor):
            self.total.add_(value, alpha=weight)
        else:
            self.total = self.total + value * weight

    def epoch_value(self) -> Value | None:
        """The value of the epoch so far; None where nothing was logged."""
        if self.metric is not None:
            return scalar(self.name, self.metric.compute())
        if self.total is None or self.options.reduce_fx != "mean":
            return self.total
        return self.total / self.weight if self.weight else math.nan

    def reset(self) -> None:
        """Start anew for the next epoch."""
        self.last, self.total, self.weight = None, None, 0.0
        if self.metric is not None:
            self.metric.reset()


def _wide(value: Value) -> Value:
    if not isinstance(value, Tensor):
        return value
    # MPS has no float64.
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def extreme(reduce_fx: object, a: Value, b: Value) -> Value:
    """The smaller of two values, or the larger one: `reduce_fx` is "min" or "max"."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        # As among tensors, one that is not a number stays; Python's min would drop it from the second place.
        return b if math.isnan(b) else min(a, b) if reduce_fx == "min" else max(a, b)
    left, right = torch.as_tensor(a), torch.as_tensor(b)
    return torch.minimum(left, right) if reduce_fx == "min" else torch.maximum(left, right)


def scalar(name: str, value: Any) -> Tensor:
    """What a torchmetrics object gives, as a 0-d tensor.

    Raises:
        MisconfigurationException: It is not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise MisconfigurationException(
            f"self.log({name!r}, metric): the metric gives {shape}, not one number; log its parts, or use on_epoch "
            "only where it has no value for a single step"
        )
    return value.detach().reshape(())


def fetch(values: list[tuple[Meter, Value]]) -> list[tuple[Meter, float]]:
    """Python floats of 0-d tensors (one device-to-host copy for all) and of numbers, in order."""
    tensors = [value for _, value in values if isinstance(value, Tensor) and not value.is_cpu]
    fetched: list[float] = []
    if tensors:
        device = tensors[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        fetched = torch.stack([tensor.to(device, dtype) for tensor in tensors]).tolist()
    supply = iter(fetched)
    # What is in the CPU's memory is a number at once.
    return [(m, next(supply) if isinstance(v, Tensor) and not v.is_cpu else float(v)) for m, v in values]


def over_processes(results: list[tuple[Meter, float]], suffix: str) -> list[tuple[Meter, float]]:
    """Merge the values that ask for `sync_dist` over processes; in those of an epoch every sample counts once.

    Names are matched, not positions: a process whose share had fewer batches may have logged less.
    """
    of_step = suffix == "_step"
    # A torchmetrics object reduces its epoch's value itself.
    wanted = [(m, number) for m, number in results if m.options.sync_dist and (of_step or m.metric is None)]
    if not distributed.active() or (of_step and not wanted):
        return results
    mine = {meter.label(suffix): (number, 1.0 if of_step else meter.weight) for meter, number in wanted}
    gathered = distributed.one_of_each_group(distributed.all_gather(mine))
    merged = []
    for meter, number in results:
        label = meter.label(suffix)
        column = [values[label] for values in gathered if label in values]
        merged.append((meter, merge(meter.options.reduce_fx, column) if label in mine else number))
    return merged


def merge(reduce_fx: object, values: list[tuple[float, float]]) -> float:
    """One number of several (number, weight)."""
    numbers = [number for number, _ in values]
    if reduce_fx == "mean":
        # Without samples behind it a mean is NaN.
        behind = [(number, weight) for number, weight in values if weight]
        weights = sum(weight for _, weight in behind)
        return sum(number * weight for number, weight in behind) / weights if weights else math.nan
    return min(numbers) if reduce_fx == "min" else max(numbers) if reduce_fx == "max" else sum(numbers)

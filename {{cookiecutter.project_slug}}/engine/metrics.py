"""The back end of `self.log`: meters that live on the device, and few, batched readings of them.

`log` adds to a meter with one or two small kernels and never waits for the device. Python numbers for loggers and
the progress bar exist only after a flush, which fetches all values in one copy: on log steps and at epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from engine import distributed
from engine.exceptions import MisconfigurationException

Value = Tensor | float


class Scope(Enum):
    """Where logging happens; it decides the defaults of `on_step` and `on_epoch`."""

    TRAIN_BATCH = "a training batch"
    EVAL_BATCH = "a validation or test batch"
    EPOCH = "the start or end of an epoch"


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
        last: The newest value, 0-d and detached, if logged on steps.
        total: Sum (weighted, for means), minimum or maximum since the epoch began, float64 where the device has it.
        weight: Number of samples behind `total`.
        metric: The torchmetrics object that was logged, which keeps the epoch's value itself.
    """

    name: str
    loader: int | None
    options: LogOptions
    last: Value | None = None
    total: Value | None = None
    weight: float = 0.0
    metric: Metric | None = None

    def label(self, suffix: str = "") -> str:
        """Full name; the suffix "_step" or "_epoch" counts only where both of these values are logged."""
        forked = self.options.on_step and self.options.on_epoch
        tail = "" if self.loader is None else f"/dataloader_idx_{self.loader}"
        return f"{self.name}{suffix if forked else ''}{tail}"

    def add(self, value: Value, weight: float) -> None:
        """Take in one value that stands for `weight` samples."""
        if self.options.on_step:
            self.last = value
        if not self.options.on_epoch:
            return
        reduce_fx = self.options.reduce_fx
        if reduce_fx == "mean":
            self.weight += weight
        if self.total is None:
            self.total = _wide(value) * weight if reduce_fx == "mean" else _wide(value)
        elif reduce_fx in ("mean", "sum"):
            scale = weight if reduce_fx == "mean" else 1.0
            if isinstance(self.total, Tensor) and isinstance(value, Tensor):
                self.total.add_(value, alpha=scale)
            else:
                self.total = self.total + value * scale
        else:
            self.total = _extreme(reduce_fx, self.total, value)

    def epoch_value(self) -> Value | None:
        """The value of the epoch so far; None where nothing was logged."""
        if self.metric is not None:
            return _scalar(self.name, self.metric.compute())
        if self.total is None or self.options.reduce_fx != "mean":
            return self.total
        return self.total / self.weight

    def reset(self) -> None:
        """Start anew for the next epoch."""
        self.last, self.total, self.weight = None, None, 0.0
        if self.metric is not None:
            self.metric.reset()


@dataclass
class MetricStore:
    """All meters of a trainer, and the values of the last flush.

    Attributes:
        stage: "train", "validation" or "test": meters of different stages never mix.
        scope: Where the loop stands; None where logging is not possible.
        loader: Number of the evaluation loader, if there are several.
        callback_values: Name to 0-d tensor, what callbacks may monitor; lives as long as the run.
        fresh: Names with a new value since the current training epoch began.
        validated: Whether validation has run, so that its names are known.
        logged: Name to float as last handed to the loggers.
        progress_bar: Name to float as last shown.
    """

    stage: str = "train"
    scope: Scope | None = None
    loader: int | None = None
    meters: dict[tuple[str, Scope, str, int | None], Meter] = field(default_factory=dict)
    callback_values: dict[str, Tensor] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    validated: bool = False
    logged: dict[str, float] = field(default_factory=dict)
    progress_bar: dict[str, float] = field(default_factory=dict)
    _batch: Any = None
    _batch_size: int | None = None

    def begin_batch(self, scope: Scope | None, batch: Any) -> None:
        """A batch starts; its size is looked up only if somebody logs a mean."""
        self.scope, self._batch, self._batch_size = scope, batch, None

    def log(
        self, name: str, value: Value | Metric, options: LogOptions, batch_size: int | None, add_dataloader_idx: bool
    ) -> None:
        """Record a value; the arguments are those of `Module.log`."""
        scope = self.scope
        if scope is None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) is not possible in this hook: log in steps, batch hooks and the hooks at "
                "the start or end of an epoch"
            )
        key = (self.stage, scope, name, self.loader if add_dataloader_idx else None)
        meter = self.meters.get(key)
        options = _resolve(scope, options)
        if meter is None:
            _check(name, scope, options)
            meter = self.meters[key] = Meter(name, key[3], options)
        elif meter.options != options:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called before with other options ({meter.options}); give the same ones"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise MisconfigurationException(
                    f"self.log({name!r}, ...) was given a tensor of shape {tuple(value.shape)}; log one number, "
                    "for example its mean()"
                )
            # A copy, because what was logged may be changed in place before the next flush.
            meter.add(value.detach().clone().reshape(()), self._weight(options, batch_size))
        elif isinstance(value, Metric):
            meter.metric = value
            if options.on_step:
                meter.last = _scalar(name, value._forward_cache)
        elif isinstance(value, Real):
            meter.add(float(value), self._weight(options, batch_size))
        else:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was given a {type(value).__name__}; log a number, a tensor of one element "
                "or a torchmetrics Metric"
            )

    def flush_step(self) -> dict[str, float]:
        """Fetch the newest step values of this stage, in one copy; returns those meant for the loggers."""
        of_stage = [m for key, m in self.meters.items() if key[0] == self.stage and m.loader in (None, self.loader)]
        meters = [m for m in of_stage if m.last is not None]
        numbers = _to_floats([m.last for m in meters if m.last is not None])
        # Only in training do all processes run the same batches.
        if self.stage == "train" and distributed.active() and any(m.options.sync_dist for m in meters):
            numbers = _reduce_steps(meters, numbers)
        for meter, number in zip(meters, numbers, strict=True):
            if meter.options.prog_bar:
                self.progress_bar[meter.label("_step")] = number
        to_logger = {m.label("_step"): n for m, n in zip(meters, numbers, strict=True) if m.options.logger}
        self.logged.update(to_logger)
        if self.stage != "train":
            for meter in meters:
                meter.last = None
        return to_logger

    def flush_epoch(self) -> list[tuple[Meter, float]]:
        """Compute, fetch and reset the epoch values of this stage."""
        self.validated |= self.stage == "validation"
        self._keep_step_values()
        of_stage = [m for key, m in self.meters.items() if key[0] == self.stage]
        meters = [m for m in of_stage if m.options.on_epoch]
        if distributed.active():
            _reduce_epoch(meters)
        pairs = [(m, v) for m, v in ((m, m.epoch_value()) for m in meters) if v is not None]
        numbers = _to_floats([value for _, value in pairs])
        for (meter, value), number in zip(pairs, numbers, strict=True):
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            name = meter.label("_epoch")
            for alias in {name, meter.label()}:
                self.callback_values[alias] = tensor.float() if tensor.is_floating_point() else tensor
                self.fresh.add(alias)
            if meter.options.prog_bar:
                self.progress_bar[name] = number
            if meter.options.logger:
                self.logged[name] = number
        for meter in of_stage:
            meter.reset()
        return [(meter, number) for (meter, _), number in zip(pairs, numbers, strict=True)]

    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything that can be monitored, as 0-d tensors: epoch values, and the newest step values of training."""
        self._keep_step_values()
        return self.callback_values

    def clear(self) -> None:
        """Forget everything, as at the start of a run and after the sanity check."""
        for meter in self.meters.values():
            meter.reset()
        self.loader, self.scope, self.validated = None, None, False
        for container in (self.meters, self.callback_values, self.fresh, self.logged, self.progress_bar):
            container.clear()

    def _keep_step_values(self) -> None:
        for (stage, *_), meter in self.meters.items():
            if stage == "train" and meter.last is not None:
                value = meter.last if isinstance(meter.last, Tensor) else torch.tensor(meter.last)
                for alias in {meter.label("_step"), meter.label()}:
                    self.callback_values[alias] = value
                    self.fresh.add(alias)

    def _weight(self, options: LogOptions, batch_size: int | None) -> float:
        if not options.on_epoch or options.reduce_fx != "mean":
            return 1.0
        if batch_size is not None:
            return float(batch_size)
        if self.scope is Scope.EPOCH:
            return 1.0
        if self._batch_size is None:
            self._batch_size = find_batch_size(self._batch)
        return float(self._batch_size or 1)


def find_batch_size(batch: Any) -> int | None:
    """First dimension of the first tensor in `batch`, however nested; None where there is no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif hasattr(batch, "__dataclass_fields__"):
        batch = vars(batch).values()
    elif not isinstance(batch, list | tuple):
        return None
    return next((size for size in map(find_batch_size, batch) if size is not None), None)


def _resolve(scope: Scope, given: LogOptions) -> LogOptions:
    """Options with the defaults of the scope, and the reduction by name."""
    on_step, on_epoch, prog_bar, logger, reduce_fx, sync_dist = given
    training = scope is Scope.TRAIN_BATCH
    return LogOptions(
        training if on_step is None else on_step,
        not training if on_epoch is None else on_epoch,
        prog_bar,
        logger,
        reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx)),
        sync_dist,
    )


def _check(name: str, scope: Scope, options: LogOptions) -> None:
    if options.reduce_fx not in ("mean", "sum", "min", "max"):
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={options.reduce_fx!r}); give 'mean', 'sum', 'min' or 'max'"
        )
    if not options.on_step and not options.on_epoch:
        raise MisconfigurationException(f"self.log({name!r}, on_step=False, on_epoch=False); set one of them to True")
    if options.on_step and scope is Scope.EPOCH:
        raise MisconfigurationException(f"self.log({name!r}, on_step=True) at {scope.value}; only on_epoch works here")


def _wide(value: Value) -> Value:
    if not isinstance(value, Tensor):
        return value
    # MPS has no float64.
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _extreme(reduce_fx: object, a: Value, b: Value) -> Value:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return min(a, b) if reduce_fx == "min" else max(a, b)
    left, right = torch.as_tensor(a), torch.as_tensor(b)
    return torch.minimum(left, right) if reduce_fx == "min" else torch.maximum(left, right)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise MisconfigurationException(
            f"self.log({name!r}, metric): the metric gives {shape}, not one number; log its parts, or use on_epoch "
            "only where it has no value for a single step"
        )
    return value.detach().reshape(())


def _to_floats(values: list[Value]) -> list[float]:
    """Python floats of 0-d tensors (one device-to-host copy for all) and of numbers, in order."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    fetched: list[float] = []
    if tensors:
        device = tensors[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        fetched = torch.stack([tensor.to(device, dtype) for tensor in tensors]).tolist()
    supply = iter(fetched)
    return [next(supply) if isinstance(value, Tensor) else float(value) for value in values]


def _reduce_steps(meters: list[Meter], numbers: list[float]) -> list[float]:
    """Mean, sum, min or max over processes of the step values that ask for `sync_dist`."""
    gathered = distributed.all_gather({m.label("_step"): n for m, n in zip(meters, numbers, strict=True)})
    reduced = []
    for meter, number in zip(meters, numbers, strict=True):
        column = [values[meter.label("_step")] for values in gathered if meter.label("_step") in values]
        total = _combine(meter.options.reduce_fx, column) / (len(column) if meter.options.reduce_fx == "mean" else 1)
        reduced.append(total if meter.options.sync_dist else number)
    return reduced


def _reduce_epoch(meters: list[Meter]) -> None:
    """Merge totals and weights over processes, so that every sample counts once.

    Names are matched, not positions: a process whose share had fewer batches may have logged less.
    """
    wanted = [m for m in meters if m.options.sync_dist and m.metric is None and m.total is not None]
    totals = _to_floats([m.total for m in wanted if m.total is not None])
    mine = {m.label("_epoch"): (total, m.weight) for m, total in zip(wanted, totals, strict=True)}
    gathered = distributed.all_gather(mine)
    for meter in wanted:
        parts = [values[meter.label("_epoch")] for values in gathered if meter.label("_epoch") in values]
        meter.total = _combine(meter.options.reduce_fx, [total for total, _ in parts])
        meter.weight = sum(weight for _, weight in parts)


def _combine(reduce_fx: object, numbers: list[float]) -> float:
    return min(numbers) if reduce_fx == "min" else max(numbers) if reduce_fx == "max" else sum(numbers)

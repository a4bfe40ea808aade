"""The back end of `self.log`: meters that live on the device, and few, batched readings of them.

`log` adds to a meter with one or two small kernels and never waits for the device. Python numbers for loggers and
the progress bar exist only after a flush, which fetches all values in one copy: on log steps and at epoch ends. What is
in the CPU's memory is a number at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.hooks import find_batch_size
from engine.kinds import is_metric
from engine.meters import LogOptions, Meter, Value, fetch, merge, over_processes, scalar

if TYPE_CHECKING:
    from torchmetrics import Metric

# What `self.log` takes beside metrics. Made once: it is looked at with every value.
NUMBERS = (float, Tensor, Real)


class Scope(Enum):
    """Where logging happens; it decides the defaults of `on_step` and `on_epoch`."""

    TRAIN_BATCH = "a training batch"
    EVAL_BATCH = "a validation or test batch"
    EPOCH = "the start or end of an epoch"

    # By identity, because a scope is looked up with every value that is logged.
    __hash__ = object.__hash__


@dataclass
class MetricStore:
    """All meters of a trainer, and the values of the last flush.

    Attributes:
        stage: "train", "validation" or "test": meters of different stages never mix.
        scope: Where the loop stands; None where logging is not possible.
        loader: What the evaluation loader is called, if there are several.
        samples: Samples run through each evaluation loader so far, if they have names.
        callback_values: Name to 0-d tensor, what callbacks may monitor; lives as long as the run.
        epoch_reached: Whether an epoch of the stage is at its end, so that values of it can be monitored.
        fresh: Names with a new value since the current training epoch began.
        validated: Whether validation has run, so that its names are known.
        logged: Name to float as last handed to the loggers.
        progress_bar: Name to float as last shown.
        batch: The newest batch.
    """

    stage: str = "train"
    scope: Scope | None = None
    loader: str | None = None
    samples: dict[str, int] = field(default_factory=dict)
    meters: dict[tuple[str, Scope, str, str | None], Meter] = field(default_factory=dict)
    callback_values: dict[str, Tensor] = field(default_factory=dict)
    epoch_reached: bool = False
    fresh: set[str] = field(default_factory=set)
    validated: bool = False
    logged: dict[str, float] = field(default_factory=dict)
    progress_bar: dict[str, float] = field(default_factory=dict)
    batch: Any = None
    _batch_size: int | None = None

    def begin_batch(self, scope: Scope | None, batch: Any) -> None:
        """A batch starts; its size is looked up only if somebody logs a mean."""
        self.scope, self.batch, self._batch_size = scope, batch, None
        if self.loader in self.samples:
            self.samples[self.loader] += self._size() or 1

    def log(
        self, name: str, value: Value | Metric, given: tuple[Any, ...], batch_size: int | None, add_dataloader_idx: bool
    ) -> None:
        """Record a value; `given` are `LogOptions` before defaults, the other arguments those of `Module.log`."""
        scope = self.scope
        if scope is None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) is not possible in this hook; log in steps, batch hooks or at an epoch's ends"
            )
        key = (self.stage, scope, name, self.loader if add_dataloader_idx else None)
        meter = self.meters.get(key)
        if meter is None:
            resolved = _resolve(scope, LogOptions(*given))
            _check(name, scope, resolved)
            meter = self.meters[key] = Meter(name, key[3], resolved, home=self.loader, given=given)
        elif meter.given != given and meter.options != _resolve(scope, LogOptions(*given)):
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called before with other options ({meter.options}); give the same ones"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise MisconfigurationException(
                    f"self.log({name!r}, ...) was given a tensor of shape {tuple(value.shape)}; log its mean(), say"
                )
            # A copy, because what was logged may be changed in place before the next flush. The CPU's memory is read at
            # once, which takes a sixth of the time.
            value = value.item() if value.is_cpu else (value.reshape(()) if value.ndim else value).detach().clone()
        if isinstance(value, NUMBERS):
            value = value if isinstance(value, Tensor) else float(value)
            if meter.options.on_epoch:
                meter.add(value, self._weight(meter.options, batch_size))
            meter.last = value if meter.options.on_step else None
        elif is_metric(value):
            meter.metric = value
            # A metric that was only updated has no value of its own for the step.
            if meter.options.on_step and value._forward_cache is not None:
                meter.last = scalar(name, value._forward_cache)
        else:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was given a {type(value).__name__}; log a number, a tensor of one element "
                "or a torchmetrics Metric"
            )

    def flush_step(self) -> dict[str, float]:
        """Fetch the newest step values of this stage, in one copy; returns those meant for the loggers."""
        stepped = [(key[0], m) for key, m in self.meters.items() if m.last is not None]
        found = [(m, m.last) for stage, m in stepped if stage == self.stage and m.loader in (None, self.loader)]
        if not found:
            return {}
        results = fetch(found)  # type: ignore[arg-type]
        if self.stage == "train":
            # Only in training do all processes run the same batches.
            results = over_processes(results, "_step")
        else:
            for meter, _ in results:
                meter.last = None
        return self._publish(results, "_step")

    def flush_epoch(self, reset: bool = True) -> list[tuple[Meter, float]]:
        """Compute, fetch and reset the epoch values of this stage; for named sets, add what they have in common."""
        self.validated |= self.stage == "validation"
        self.epoch_reached = False
        results = self._read_epoch()
        self._publish(results, "_epoch")
        if reset:
            self.reset(self.stage)
        for meter, _ in results:
            # An epoch that goes on keeps its sums.
            meter.last = None
        return results

    def _read_epoch(self, together: bool = True) -> list[tuple[Meter, float]]:
        """The values of the epoch so far, also for callbacks to monitor; of all processes, if these come together."""
        self._keep_step_values()
        of_stage = [m for key, m in self.meters.items() if key[0] == self.stage]
        found = [(m, v) for m in of_stage if m.options.on_epoch and (v := m.epoch_value()) is not None]
        # One process may look alone: it waits for others only where a value asks for it.
        together = together or any(m.options.sync_dist and m.metric is None for m, _ in found)
        results = over_processes(fetch(found), "_epoch") if together else fetch(found)
        results += self._over_sets(results, together)
        for meter, number in results:
            for alias in dict.fromkeys((meter.label("_epoch"), meter.label())):
                self.callback_values[alias] = torch.tensor(number)
                self.fresh.add(alias)
        return results

    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything that can be monitored, as 0-d tensors: epoch values, and the newest step values of training."""
        if self.epoch_reached:
            self._read_epoch(together=False)
        else:
            self._keep_step_values()
        return self.callback_values

    def reset(self, stage: str) -> None:
        """Forget the running values of a stage."""
        for (of_stage, *_), meter in self.meters.items():
            if of_stage == stage:
                meter.reset()

    def clear(self) -> None:
        """Forget everything, as at the start of a run and after the sanity check."""
        for meter in self.meters.values():
            meter.reset()
        self.loader, self.scope, self.validated, self.epoch_reached = None, None, False, False
        for container in (self.meters, self.callback_values, self.fresh, self.logged, self.progress_bar):
            container.clear()

    def state_dict(self, metric_names: Mapping[int, str]) -> dict[str, Any]:
        """All running values; `metric_names` tells by `id` what torchmetrics objects are called in the module."""
        running = [
            [stage, scope.name, *key, m.loader, [*m.options], m.last, m.total, m.weight, metric_names.get(id(m.metric))]
            for (stage, scope, *key), m in self.meters.items()
            if m.last is not None or m.total is not None or (m.metric is not None and m.metric._update_count)
        ]
        kept = {name: dict(getattr(self, name)) for name in ("logged", "progress_bar")}
        # Whoever looks at them may change them in place.
        kept["callback_values"] = {name: value.clone() for name, value in self.callback_values.items()}
        return {**kept, "validated": self.validated, "fresh": sorted(self.fresh), "meters": deepcopy(running)}

    def load_state_dict(self, state: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; `metrics` are the module's parts by name."""
        if type(state["validated"]) is not bool:
            raise TypeError("validated is true or false")
        for stage, scope, name, tag, loader, options, last, total, weight, metric in state["meters"]:
            for value in (last, total, weight):
                if not isinstance(value, int | float | None) and not (isinstance(value, Tensor) and not value.ndim):
                    raise TypeError(f"{name}: one number expected")
            values = {"last": last, "total": total, "weight": weight, "metric": metrics.get(metric)}
            self.meters[stage, Scope[scope], name, tag] = Meter(name, loader, LogOptions(*options), **values)
        for name in ("callback_values", "logged", "progress_bar"):
            getattr(self, name).update(state[name])
        self.fresh.update(state["fresh"])
        self.validated = state["validated"]

    def nonfinite(self) -> list[str]:
        """Names of the newest values of training steps that are NaN or infinite."""
        newest = [(m, m.last) for (stage, *_), m in self.meters.items() if stage == "train" and m.last is not None]
        return [meter.label("_step") for meter, number in fetch(newest) if not math.isfinite(number)]

    def _keep_step_values(self) -> None:
        for (stage, *_), meter in self.meters.items():
            if stage == "train" and meter.last is not None:
                value = meter.last if isinstance(meter.last, Tensor) else torch.tensor(meter.last)
                for alias in dict.fromkeys((meter.label("_step"), meter.label())):
                    self.callback_values[alias] = value
                    self.fresh.add(alias)

    def _publish(self, results: list[tuple[Meter, float]], suffix: str) -> dict[str, float]:
        """Show values in the progress bar, of named sets only what they have in common; return those to log."""
        for meter, number in results:
            if meter.options.prog_bar and meter.loader not in self.samples:
                self.progress_bar[meter.label(suffix)] = number
        to_logger = {meter.label(suffix): number for meter, number in results if meter.options.logger}
        self.logged.update(to_logger)
        return to_logger

    def _over_sets(self, results: list[tuple[Meter, float]], together: bool) -> list[tuple[Meter, float]]:
        """Under the plain name of each value of named sets: their mean by samples, or their sum, minimum or maximum."""
        parts = [self.samples]
        if self.samples and together:
            parts = distributed.one_of_each_group(distributed.all_gather(self.samples))
        samples = {name: float(sum(part[name] for part in parts)) for name in self.samples}
        owners = {(id(m.metric), m.loader) for m, _ in results if m.metric is not None and m.loader in samples}
        if len({metric for metric, _ in owners}) < len(owners):
            raise MisconfigurationException("one torchmetrics object was logged for several sets; give each a clone()")
        # A value that was logged under the plain name stays.
        plain = {meter.name for meter, _ in results if meter.loader is None}
        sets: dict[str, list[tuple[Meter, float]]] = {}
        for meter, number in results:
            if meter.loader in samples and meter.name not in plain:
                sets.setdefault(meter.name, []).append((meter, number))
        merged = []
        for name, members in sets.items():
            options = members[0][0].options
            values = [(number, samples[str(meter.loader)]) for meter, number in members]
            merged.append((Meter(name, None, options), merge(options.reduce_fx, values)))
        return merged

    def _weight(self, options: LogOptions, batch_size: int | None) -> float:
        at_end = self.scope is Scope.EPOCH and batch_size is None
        if at_end or options.reduce_fx != "mean":
            return 1.0
        size = self._size() if batch_size is None else batch_size
        if size is None:
            raise MisconfigurationException(
                f"self.log of a mean over an epoch: a batch of type {type(self.batch).__name__} does not tell its "
                "size; give batch_size"
            )
        return float(size)

    def _size(self) -> int | None:
        if self._batch_size is None:
            self._batch_size = find_batch_size(self.batch)
        return self._batch_size


def _resolve(scope: Scope, given: LogOptions) -> LogOptions:
    """Options with the defaults of the scope, and the reduction by name."""
    training, reduce_fx = scope is Scope.TRAIN_BATCH, given.reduce_fx
    return given._replace(
        on_step=training if given.on_step is None else given.on_step,
        on_epoch=not training if given.on_epoch is None else given.on_epoch,
        reduce_fx=reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx)),
    )


def _check(name: str, scope: Scope, options: LogOptions) -> None:
    if "/dataloader_idx_" in name:
        raise MisconfigurationException(f"self.log({name!r}, ...): /dataloader_idx_N is put behind names by itself")
    if options.reduce_fx not in ("mean", "sum", "min", "max"):
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={options.reduce_fx!r}); give 'mean', 'sum', 'min' or 'max'"
        )
    if not options.on_step and not options.on_epoch:
        raise MisconfigurationException(f"self.log({name!r}, on_step=False, on_epoch=False); set one of them to True")
    if options.on_step and scope is Scope.EPOCH:
        raise MisconfigurationException(f"self.log({name!r}, on_step=True) at {scope.value}; only on_epoch works here")

"""Kinds of values from packages that are slow to import: before somebody has imported one, nobody has such a value."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torchmetrics import Metric, MetricCollection


def _is(value: Any, package: str, name: str) -> bool:
    imported = sys.modules.get(package)
    return imported is not None and isinstance(value, getattr(imported, name, ()))


def is_metric(value: Any) -> TypeGuard[Metric]:
    """Whether a value is a torchmetrics object."""
    return _is(value, "torchmetrics", "Metric")


def is_collection(value: Any) -> TypeGuard[MetricCollection]:
    """Whether a value is a torchmetrics `MetricCollection`."""
    return _is(value, "torchmetrics", "MetricCollection")


def is_spread(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor that is spread over processes."""
    return _is(value, "torch.distributed.tensor", "DTensor")


def is_sharded(value: Any) -> TypeGuard[Any]:
    """Whether a value is a module whose parameters torch's `fully_shard` spreads over processes."""
    return _is(value, "torch.distributed.fsdp", "FSDPModule")

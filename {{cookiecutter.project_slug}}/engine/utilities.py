"""What user code may call in every process and wants done by the first one only; the names are Lightning's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from engine.distributed import is_rank_zero, rank_zero_warn

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Decorator: call the function in the first process; elsewhere it does nothing, and returns None."""

    @functools.wraps(function)
    def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if is_rank_zero() else None

    return on_rank_zero


@rank_zero_only
def rank_zero_info(message: str) -> None:
    """Log a message at level INFO."""
    logging.getLogger("engine").info(message)

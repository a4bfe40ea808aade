"""LambdaCallback: a callback made of functions."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from engine.callback import Callback
from engine.exceptions import MisconfigurationException


class LambdaCallback(Callback):
    """Calls functions as hooks: `LambdaCallback(on_train_end=lambda trainer, pl_module: ...)`.

    Args:
        **hooks: Functions by the name of the hook, with its arguments but `self`; None for none.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        known = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
        for name, function in hooks.items():
            if name not in known:
                nearest = " or ".join(difflib.get_close_matches(name, known, 1)) or f"one of {', '.join(known)}"
                raise MisconfigurationException(f"LambdaCallback({name}=...): there is no such hook; give {nearest}")
            if function is not None:
                setattr(self, name, function)

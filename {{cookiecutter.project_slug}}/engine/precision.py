"""Number formats: what is converted, autocast and loss scaling, in one class."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from engine.exceptions import MisconfigurationException
from engine.hooks import convert

PrecisionName = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]
PrecisionAlias = Literal["32", "16", "bf16", "64"]
ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true", "None": "32-true"}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class Precision:
    """What differs between number formats in a training step.

    Mixed precision keeps weights in float32 and lets torch's autocast choose per operation
    (Micikevicius et al. 2018). fp16 also scales the loss, since its small gradients would vanish. The true formats
    hold weights, and all floating-point data, in that format.

    Args:
        name: One of `PrecisionName`, or a shorter name for it.
        device: Where the model runs.

    Attributes:
        dtype: What weights and data are converted to; None leaves them alone.
        context: Around every forward pass, and around building the model.
        plain: The context does nothing, so that a training step need not enter it.

    Raises:
        MisconfigurationException: `name` is none of them.
    """

    def __init__(self, name: str | int | None, device: torch.device) -> None:
        self.name = ALIASES.get(str(name), str(name))
        if self.name not in get_args(PrecisionName):
            allowed = ", ".join(get_args(PrecisionName))
            raise MisconfigurationException(f"precision={name!r} is not supported; give one of {allowed}")
        self.scaler = torch.amp.GradScaler(device.type) if self.name == "16-mixed" else None
        self.dtype = _TRUE.get(self.name)
        self.context: AbstractContextManager[Any] = nullcontext()
        if self.name in _AUTOCAST:
            self.context = torch.autocast(device.type, _AUTOCAST[self.name])
        elif self.dtype is not None:
            self.context = _DefaultDtype(self.dtype)
        self.plain = isinstance(self.context, nullcontext)

    def convert_input(self, batch: Any) -> Any:
        """A batch whose floating-point tensors have the format of the weights, which is a true one."""
        return convert(batch, lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients back to their true size."""
        if self.scaler is not None and _has_gradients(optimizer):
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update the weights, after `closure` has computed the gradients; under fp16, only if every one is finite."""
        if self.scaler is None:
            return optimizer.step(**kwargs) if closure is None else optimizer.step(closure=closure, **kwargs)
        result = None if closure is None else closure()
        if _has_gradients(optimizer):
            self.scaler.step(optimizer, **kwargs)
            self.scaler.update()
        return result

    def state_dict(self) -> dict[str, Any]:
        """State of the loss scale; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class _DefaultDtype:
    """Makes new tensors of a type, within the block; can be entered again and again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._before: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._before.append(torch.get_default_dtype())
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before.pop())


def _has_gradients(optimizer: Optimizer) -> bool:
    # The scaler refuses an optimizer without any, as after training steps that returned None.
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

"""Number formats: autocast and loss scaling, in one class."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.exceptions import MisconfigurationException

PrecisionName = Literal["32-true", "bf16-mixed", "16-mixed"]
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Precision:
    """What differs between number formats in a training step.

    Mixed precision keeps weights in float32 and lets torch's autocast choose per operation
    (Micikevicius et al. 2018). fp16 also scales the loss, since its small gradients would vanish.

    Args:
        name: One of `PrecisionName`.
        device: Where the model runs.

    Raises:
        MisconfigurationException: `name` is none of them.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name not in get_args(PrecisionName):
            allowed = ", ".join(get_args(PrecisionName))
            raise MisconfigurationException(f"precision={name!r} is not supported; give one of {allowed}")
        self.name = name
        self.scaler = torch.amp.GradScaler(device.type) if name == "16-mixed" else None
        # Around every forward pass.
        self.context: AbstractContextManager[Any] = nullcontext()
        if name in _AUTOCAST:
            self.context = torch.autocast(device.type, _AUTOCAST[name])

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: scaled under fp16, itself otherwise."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients back to their true size."""
        if self.scaler is not None and _has_gradients(optimizer):
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Update the weights; under fp16, only if every gradient is finite."""
        if self.scaler is None:
            optimizer.step()
        elif _has_gradients(optimizer):
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of the loss scale; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def _has_gradients(optimizer: Optimizer) -> bool:
    # The scaler refuses an optimizer without any, as after training steps that returned None.
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

"""What makes a net faster and leaves its outputs and its checkpoints as they are: memory format, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def accelerate(net: nn.Module, channels_last: bool, compiled: bool, sharded: bool = False) -> None:
    """Change a net in place, before it is moved to its device.

    Args:
        net: The net.
        channels_last: Lay 4-D weights and 4-D inputs out in memory with the channels of a pixel side by side.
        compiled: Compile it.
        sharded: Its parameters are to be spread over processes, which takes them in torch's usual format. A
            convolution follows its inputs then.
    """
    if channels_last:
        net.register_forward_pre_hook(_channels_last)
        if not sharded:
            net.to(memory_format=torch.channels_last)
    if compiled:
        # In place: a module around the net would put its name before those of the weights.
        net.compile()


def _channels_last(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # A hook: the net may be called by others than the model, and costs nothing more where this is off.
    return tuple(
        value.to(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value
        for value in inputs
    )

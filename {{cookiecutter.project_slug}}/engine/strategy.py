"""How a training step spreads over processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import distributed
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.module import Module


class StepProxy(nn.Module):
    """Routes `forward` to `training_step`, since DistributedDataParallel hooks into `forward` only."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        """Run the module's training step."""
        return self.module.training_step(*args)


class Strategy(NamedTuple):
    """What a training step calls.

    Attributes:
        training_step: The module's own training step, or the one through DistributedDataParallel.
        no_sync: Around the backward passes of an accumulation window, all but its last.
    """

    training_step: Callable[..., Any]
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext


def make_strategy(module: Module, device: torch.device) -> Strategy:
    """The strategy for training `module`, which lies on `device`: DDP where there are several processes.

    Each has a full copy, and the backward pass averages gradients. Evaluation calls the module itself.
    """
    if not distributed.active() or not any(p.requires_grad for p in module.parameters()):
        return Strategy(module.training_step)
    ddp = DistributedDataParallel(StepProxy(module), device_ids=[device.index] if device.type == "cuda" else None)
    return Strategy(ddp, ddp.no_sync)


def select_device(accelerator: str) -> torch.device:
    """The device of this process.

    Args:
        accelerator: "auto" (cuda, else mps, else cpu), "cpu", "gpu", "cuda" or "mps".

    Raises:
        MisconfigurationException: There is no such device.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = {"auto": ["cuda", "mps", "cpu"], "gpu": ["cuda", "mps"]}.get(accelerator, [accelerator])
    kind = next((kind for kind in wanted if has.get(kind)), None)
    if kind is None:
        known = accelerator in ("auto", "gpu", *has)
        reason = "not available on this machine" if known else "not supported"
        available = ", ".join(kind for kind in has if has[kind])
        raise MisconfigurationException(f"accelerator={accelerator!r} is {reason}; available: auto, {available}")
    return torch.device(kind, distributed.local_rank()) if kind == "cuda" else torch.device(kind)


def check_devices(devices: int | str, strategy: str) -> None:
    """Compare the wanted number of processes with those that were started.

    Raises:
        MisconfigurationException: They differ; the message has the command that starts as many.
    """
    if strategy not in ("auto", "ddp"):
        raise MisconfigurationException(f"strategy={strategy!r} is not supported; give auto or ddp")
    if devices == "auto":
        return
    if not isinstance(devices, int) or devices < 1:
        raise MisconfigurationException(f"devices={devices!r}; give 'auto' or a number of processes from 1")
    local = distributed.local_world_size()
    if devices != local:
        raise MisconfigurationException(
            f"devices={devices}, but {local} process{'es were' if local > 1 else ' was'} started on this machine; "
            f"run: torchrun --nproc-per-node {devices} -- main.py ..."
        )

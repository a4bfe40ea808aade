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


# What may be asked for, and whether parameters without a gradient are looked for in every step, which costs time.
STRATEGIES = {"auto": False, "ddp": False}
STRATEGIES |= {"ddp_find_unused_parameters_false": False, "ddp_find_unused_parameters_true": True}


class StepProxy(nn.Module):
    """Routes `forward` to the training step, since DistributedDataParallel hooks into `forward` only."""

    def __init__(self, module: Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, *args: Any) -> Any:
        """Run the training step."""
        return self.step(*args)


class Strategy(NamedTuple):
    """What a training step calls.

    Attributes:
        training_step: The module's own training step, or the one through DistributedDataParallel.
        no_sync: Around the backward passes of an accumulation window, all but its last.
    """

    training_step: Callable[..., Any]
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext


def make_strategy(name: str, module: Module, step: Callable[..., Any], device: torch.device) -> Strategy:
    """The strategy for training `module`, which lies on `device`: DDP where there are several processes.

    Each has a full copy, and the backward pass averages gradients. Evaluation calls the module itself. A module that
    optimises by itself has its gradients averaged when an optimizer steps, however many backward passes there were.

    Args:
        name: One of `STRATEGIES`.
        module: What is trained.
        step: Its training step.
        device: Where it is.
    """
    if not distributed.active() or not any(p.requires_grad for p in module.parameters()):
        return Strategy(step)
    if not module.automatic_optimization:
        distributed.broadcast_tensors([*module.parameters()])

        def with_the_same_buffers(*args: Any) -> Any:
            # As DistributedDataParallel does before each forward pass.
            distributed.broadcast_tensors([*module.buffers()])
            return step(*args)

        return Strategy(with_the_same_buffers)
    device_ids = [device.index] if device.type == "cuda" else None
    unused = STRATEGIES[name]
    ddp = DistributedDataParallel(StepProxy(module, step), device_ids=device_ids, find_unused_parameters=unused)
    return Strategy(ddp, ddp.no_sync)


def select_device(accelerator: str, devices: int | str | list[int]) -> torch.device:
    """The device of this process.

    Args:
        accelerator: "auto" (cuda, else mps, else cpu), "cpu", "gpu", "cuda" or "mps".
        devices: A list chooses among GPUs, one for each process of this machine.

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
    if kind != "cuda":
        return torch.device(kind)
    chosen = _indices(devices)
    index = chosen[distributed.local_rank()] if chosen else distributed.local_rank()
    if index >= torch.cuda.device_count():
        raise MisconfigurationException(f"devices={devices!r}, but this machine has {torch.cuda.device_count()} GPUs")
    return torch.device(kind, index)


def check_devices(devices: int | str | list[int], num_nodes: int, strategy: str) -> None:
    """Compare the wanted number of processes with those that were started.

    Raises:
        MisconfigurationException: They differ; the message has the command that starts as many.
    """
    if strategy not in STRATEGIES:
        raise MisconfigurationException(f"strategy={strategy!r} is not supported; give one of {', '.join(STRATEGIES)}")
    local, chosen = distributed.local_world_size(), _indices(devices)
    if type(num_nodes) is not int or num_nodes < 1 or num_nodes * local > max(distributed.world_size(), local):
        raise MisconfigurationException(
            f"num_nodes={num_nodes}, but {distributed.world_size() // local} machines take part; run on each of them: "
            f"torchrun --nnodes {num_nodes} --nproc-per-node {local} --rdzv-endpoint HOST:PORT -- main.py ..."
        )
    if devices == "auto":
        return
    wanted = len(chosen) if chosen else int(devices) if str(devices).lstrip("-").isdigit() else 0  # type: ignore[arg-type]
    if wanted == -1:
        wanted = torch.cuda.device_count() or 1
    if wanted < 1:
        raise MisconfigurationException(
            f"devices={devices!r}; give 'auto', a number of processes from 1, -1 for all GPUs, or a list of GPUs"
        )
    if wanted != local:
        raise MisconfigurationException(
            f"devices={devices}, but {local} process{'es were' if local > 1 else ' was'} started on this machine; "
            f"run: torchrun --nproc-per-node {wanted} -- main.py ..."
        )


def _indices(devices: int | str | list[int]) -> list[int]:
    """The GPUs that are listed, as in [0, 1] or "0,1"; empty if none are."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip().isdigit()]
    return [number for number in devices if type(number) is int] if isinstance(devices, list) else []

"""How training spreads over processes: strategies as data, the device of each process, and what a step calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.rendezvous import check_environment

if TYPE_CHECKING:
    from engine.module import Module


@dataclass(frozen=True)
class DDPStrategy:
    """Every process has a full copy of the model; the backward pass averages gradients (DistributedDataParallel).

    Attributes:
        find_unused_parameters: Look in every step for parameters that get no gradient, which costs time.
        static_graph: The same parameters are used in every step, and the same ones get no gradient.
        gradient_as_bucket_view: Gradients are views of what is sent, which saves memory.
        bucket_cap_mb: Size of what is sent at once, in MiB.
        process_group_backend: "gloo" or "nccl"; None takes the one that fits the device.
        timeout: How long a process waits for others; None takes torch's default.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: int | None = None
    process_group_backend: str | None = None
    timeout: timedelta | None = None


@dataclass(frozen=True)
class ModelParallelStrategy:
    """Parameters are spread over processes: by FSDP2 (`fully_shard`), tensor parallelism, or both.

    `Module.device_mesh` has the dimensions "data_parallel" and "tensor_parallel". What `configure_model` leaves
    unsharded is sharded over the first one (`engine.fsdp`). Processes that differ in the second one only get the same
    samples.

    Attributes:
        data_parallel_size: Processes that get samples of their own; "auto": one for each machine, or as many as the
            other size leaves.
        tensor_parallel_size: Processes that share each sample; "auto": those of a machine, or as many as are left.
        process_group_backend: As in DDPStrategy.
        timeout: As in DDPStrategy.
    """

    data_parallel_size: int | Literal["auto"] = "auto"
    tensor_parallel_size: int | Literal["auto"] = "auto"
    process_group_backend: str | None = None
    timeout: timedelta | None = None


Options = DDPStrategy | ModelParallelStrategy
STRATEGIES: dict[str, Options] = {
    "auto": DDPStrategy(),
    "ddp": DDPStrategy(),
    "ddp_find_unused_parameters_false": DDPStrategy(),
    "ddp_find_unused_parameters_true": DDPStrategy(find_unused_parameters=True),
    "ddp_static_graph": DDPStrategy(static_graph=True),
    "fsdp": ModelParallelStrategy(tensor_parallel_size=1),
}
TENSOR_PARALLEL = re.compile(r"fsdp_tensor_parallel_([1-9]\d*)")


def find_strategy(wanted: Any) -> Options:
    """The strategy that a name stands for, or the one that was given.

    Raises:
        MisconfigurationException: There is none of that name.
    """
    if isinstance(wanted, ModelParallelStrategy):
        for size in (wanted.data_parallel_size, wanted.tensor_parallel_size):
            if size != "auto" and (type(size) is not int or size < 1):
                raise MisconfigurationException(f"strategy={wanted!r}: give sizes as 'auto' or a number from 1")
    if isinstance(wanted, DDPStrategy | ModelParallelStrategy):
        return wanted
    if isinstance(wanted, str) and (parts := TENSOR_PARALLEL.fullmatch(wanted)):
        return ModelParallelStrategy(tensor_parallel_size=int(parts[1]))
    if not isinstance(wanted, str) or wanted not in STRATEGIES:
        raise MisconfigurationException(
            f"strategy={wanted!r} is not supported; give one of {', '.join(STRATEGIES)}, fsdp_tensor_parallel_N, or a "
            "DDPStrategy or ModelParallelStrategy of engine.strategies"
        )
    return STRATEGIES[wanted]


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


def make_strategy(options: Options, module: Module, step: Callable[..., Any], device: torch.device) -> Strategy:
    """What a step of `module`, which lies on `device`, calls.

    Under DDP the backward pass averages gradients. A module that optimises by itself has its gradients averaged when
    an optimizer steps, however many backward passes there were. Sharded parameters see to that themselves; their
    gradients are kept in shards also within an accumulation window.

    Args:
        options: The strategy.
        module: What is trained.
        step: Its training step.
        device: Where it is.
    """
    asked = distributed.joined() and options is not STRATEGIES["auto"]
    if not (distributed.active() or asked) or not any(p.requires_grad for p in module.parameters()):
        return Strategy(step)
    sharded = isinstance(options, ModelParallelStrategy)
    if sharded or not module.automatic_optimization:
        if not sharded:
            distributed.broadcast_tensors(module.parameters())

        def with_the_same_buffers(*args: Any) -> Any:
            # As DistributedDataParallel does before each forward pass.
            distributed.broadcast_tensors(module.buffers())
            return step(*args)

        return Strategy(with_the_same_buffers)
    assert isinstance(options, DDPStrategy)
    ddp = DistributedDataParallel(
        StepProxy(module, step),
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=options.bucket_cap_mb,
        find_unused_parameters=options.find_unused_parameters,
        static_graph=options.static_graph,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )
    return Strategy(ddp, ddp.no_sync)


def make_mesh(options: Options, device: torch.device) -> DeviceMesh | None:
    """The processes as a grid, data parallel by tensor parallel; None where parameters are not sharded.

    Raises:
        MisconfigurationException: The sizes do not make up the number of processes.
    """
    if not isinstance(options, ModelParallelStrategy) or not distributed.joined():
        return None
    world = distributed.world_size()
    machines = max(1, world // distributed.local_world_size())
    data, tensor = (
        size if isinstance(size, int) else 0 for size in (options.data_parallel_size, options.tensor_parallel_size)
    )
    data = data or (max(1, world // tensor) if tensor else machines)
    tensor = tensor or max(1, world // data)
    if data * tensor != world:
        raise MisconfigurationException(
            f"data_parallel_size={options.data_parallel_size}, tensor_parallel_size={options.tensor_parallel_size}, "
            f"which makes {data} x {tensor} processes, but {world} were started"
        )
    return _mesh(device.type, data, tensor, distributed.groups_joined())


@cache
def _mesh(kind: str, data: int, tensor: int, group: int) -> DeviceMesh:
    # Once for all trainers, since each makes groups of processes; anew where those have ended.
    return init_device_mesh(kind, (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))


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
    if index >= (there := torch.cuda.device_count()):
        raise MisconfigurationException(
            f"devices={devices!r}, {distributed.local_world_size()} processes on this machine, which has {there} GPUs; "
            "start one for each, or give accelerator=cpu"
        )
    return torch.device(kind, index)


def check_devices(devices: int | str | list[int], num_nodes: int) -> None:
    """Compare the wanted number of processes with those that were started.

    Raises:
        MisconfigurationException: They differ, and the message has the command that starts as many; or a launcher's
            variables make no sense.
    """
    check_environment()
    local = distributed.local_world_size()
    machines = distributed.world_size() // local
    wanted = local if devices == "auto" else len(_indices(devices))
    if str(devices).lstrip("-").isdigit():
        wanted = int(str(devices)) if int(str(devices)) != -1 else torch.cuda.device_count() or 1
    if type(num_nodes) is not int or num_nodes < 1 or num_nodes * local > max(distributed.world_size(), local):
        raise MisconfigurationException(
            f"num_nodes={num_nodes}, but {machines} machine{'s take' if machines > 1 else ' takes'} part; run on each "
            f"of them: torchrun --nnodes {num_nodes} --nproc-per-node {wanted or local} --rdzv-backend c10d "
            "--rdzv-endpoint HOST:PORT -- main.py ..."
        )
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

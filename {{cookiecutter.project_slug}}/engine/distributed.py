"""The processes of a run: who we are, and the few collectives the engine needs.

torchrun (or anything that sets `RANK`, `LOCAL_RANK` and `WORLD_SIZE`) is the only launcher. Every function works
unchanged in a single process.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from engine.exceptions import MisconfigurationException
from engine.rendezvous import check_environment, meet, number, wait_for_all

P = ParamSpec("P")
T = TypeVar("T")
# How many groups this process has joined.
_groups = 0
_tensor_parallel_size = 1
# Numbers that a collective carries at once.
AT_ONCE = 2**24


def rank() -> int:
    """Number of this process among all processes of the run; 0 without a launcher."""
    return number("RANK", 0)


def local_rank() -> int:
    """Number of this process among the processes of its machine."""
    return number("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of the run."""
    return number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes of the run on this machine."""
    return number("LOCAL_WORLD_SIZE", world_size())


def share_samples(tensor_parallel_size: int) -> None:
    """Let so many processes in a row have the same samples."""
    global _tensor_parallel_size
    _tensor_parallel_size = tensor_parallel_size


def data_rank() -> int:
    """Number of this process among those that have samples of their own."""
    return rank() // _tensor_parallel_size


def data_world_size() -> int:
    """How many processes have samples of their own."""
    return world_size() // _tensor_parallel_size


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return rank() == 0


def init(device: torch.device, backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the process group of the run; without a launcher there is none.

    Args:
        device: The device of this process.
        backend: What carries tensors; default: gloo for those on the CPU, nccl for those on a GPU.
        timeout: How long a collective may take; default: torch's.

    Raises:
        MisconfigurationException: There is no such backend, or the launcher's variables make no sense.
        TimeoutError: Other processes of the run have not started.
    """
    global _groups
    check_environment()
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = _checked(backend, device)
    _groups += 1
    # What an earlier group has left there would lead a new one astray.
    store = distributed_c10d.PrefixStore(f"group-{_groups}", meet())
    wait_for_all(store)
    on_gpu = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=on_gpu
    )
    atexit.register(destroy)


def _checked(backend: str | None, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    backend = backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    for part in backend.split(","):
        name = part.split(":")[-1].lower()
        if name == "nccl" and not on_gpu:
            raise MisconfigurationException(f"backend {backend!r} is for GPUs, and this runs on {device}; give gloo")
        if not dist.is_backend_available(name):
            there = ", ".join(kind for kind in ("gloo", "nccl", "mpi") if dist.is_backend_available(kind))
            raise MisconfigurationException(f"backend {backend!r}: this torch has no {name}, but {there}")
    # Numbers of the host travel, too.
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def destroy(failed: bool = False) -> None:
    """Leave the process group, if there is one.

    Args:
        failed: Do not wait for what is under way: other processes may never do their part of it.
    """
    if dist.is_available() and dist.is_initialized():
        if failed and "nccl" in dist.get_backend_config():
            distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        # The group's threads end with its last reference; C++ aborts a process that exits before they have.
        gc.collect()


def groups_joined() -> int:
    """How many process groups this process has been in."""
    return _groups


def joined() -> bool:
    """Whether there is a process group, perhaps of this process alone."""
    return dist.is_available() and dist.is_initialized()


def active() -> bool:
    """Whether collectives reach other processes."""
    return joined() and dist.get_world_size() > 1


def any_of(mine: bool) -> bool:
    """Whether it is so in any process."""
    if not active():
        return mine
    number = torch.tensor(int(mine), dtype=torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def barrier() -> None:
    """Wait until every process has come this far."""
    if active():
        dist.barrier()


def broadcast(value: T) -> T:
    """Give every process the value of rank 0 (any picklable object)."""
    if not active():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def everywhere(answer: bool) -> bool:
    """Whether the answer is yes in every process."""
    if not active():
        return answer
    answers = torch.tensor([answer], dtype=torch.uint8)
    dist.all_reduce(answers, dist.ReduceOp.MIN)
    return bool(answers)


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank (any picklable object)."""
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def one_of_each_group(values: list[T]) -> list[T]:
    """Of what `all_gather` gave, one for each process with samples of its own: others in its group have the same."""
    return values[::_tensor_parallel_size]


def all_gather_tensor(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
    """The tensors of all processes, stacked, on each of them; a single process gets its own back as it is."""
    if not active():
        return tensor
    if sync_grads:
        import torch.distributed.nn.functional as differentiable

        parts = differentiable.all_gather(tensor, group or dist.group.WORLD)  # type: ignore[no-untyped-call]
        return torch.stack(parts)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group)
    return torch.stack(gathered)


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace gradients by their means over all processes; one that only some of them have is zero in the others."""
    # Those that are spread over processes see to that themselves.
    parameters = [p for p in parameters if not hasattr(p, "device_mesh")]
    if not active() or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    _at_once(gradients, lambda flat: dist.all_reduce(flat.div_(dist.get_world_size())))


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of rank 0, in place."""
    if active():
        _at_once([*tensors], lambda flat: dist.broadcast(flat, src=0))


def _at_once(tensors: list[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Run a collective on all tensors of each type and device together."""
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    taken: Counter[tuple[Any, ...]] = Counter()
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        # In batches, since each is copied.
        batches.setdefault((*kind, taken[kind] // AT_ONCE), []).append(tensor.detach())
        taken[kind] += tensor.numel()
    for alike in batches.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        collective(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


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


def rank_zero_warn(message: str) -> None:
    """Warn once for the run rather than once for each process."""
    if is_rank_zero():
        warnings.warn(message, UserWarning, stacklevel=3)

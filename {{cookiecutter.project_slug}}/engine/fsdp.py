"""Sharded parameters: FSDP2 (torch's `fully_shard`) by default, and what sharded modules ask of the engine.

Every process keeps a part of each parameter. A block's parameters are gathered before its forward and backward pass,
and let go of after it; gradients are averaged in the parts where they are needed (Rajbhandari et al. 2020, ZeRO-3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.kinds import is_metric, is_sharded, is_spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

END: Any = object()
NO_BATCH = (
    "a process has no batch to evaluate while others have; give more samples, a smaller batch_size, or a loader "
    "without drop_last"
)
T = TypeVar("T")


def shard(module: nn.Module, mesh: DeviceMesh, precision: str, steps: Iterable[str]) -> None:
    """Spread the parameters of a module over the processes of the mesh's "data_parallel" dimension.

    By default each repeated block (see `repeated_blocks`) is gathered by itself, and the rest together. Where
    `configure_model` has sharded parts already, those are left alone. What is not sharded yet begins with rank 0's
    values.

    Args:
        module: What to shard.
        mesh: With the dimension "data_parallel".
        precision: With "bf16-mixed", parameters are gathered in bfloat16; gradients are reduced in float32.
        steps: Methods of the module that run forward passes, beside `forward`.

    Raises:
        MisconfigurationException: A parameter has no data yet.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    parts = [part for part in module.modules() if is_sharded(part)]
    covered = {id(p) for part in parts for p in part.parameters()}
    empty = [name for name, p in module.named_parameters() if p.is_meta]
    if empty:
        raise MisconfigurationException(f"parameter {empty[0]} is on the meta device; give it data in configure_model")
    distributed.broadcast_tensors(t for t in (*module.parameters(), *module.buffers()) if not is_spread(t))
    if not all(id(p) in covered for p in module.parameters()):
        narrow = torch.bfloat16 if precision == "bf16-mixed" else None
        wide = torch.float32 if precision.startswith("bf16") else None
        # Inputs are left alone, since targets are among them; autocast converts what an operation needs.
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=wide, cast_forward_inputs=False)
        data = mesh["data_parallel"]
        for part in [] if narrow is None else module.modules():
            own = [id(p) for p in part.parameters()] if isinstance(part, nn.modules.batchnorm._BatchNorm) else []
            if own and covered.isdisjoint(own):
                # Its running statistics are float32, and so must be its parameters.
                fully_shard(part, mesh=data)
        for block in [] if parts else repeated_blocks(module):
            fully_shard(block, mesh=data, mp_policy=policy)
        fully_shard(module, mesh=data, mp_policy=policy)
    for step in steps if is_sharded(module) else ():
        if not hasattr(vars(module).get(step), "__wrapped__"):
            register_fsdp_forward_method(module, step)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Blocks of which a ModuleList or Sequential has several of a kind, such as the layers of a transformer.

    Layers without parts of their own are no blocks: gathering each by itself would take more time than it saves.
    """
    found: list[nn.Module] = []
    for part in module.modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        blocks = [
            child for child in part if any(True for _ in child.children()) and any(True for _ in child.parameters())
        ]
        kinds = Counter(type(block) for block in blocks)
        found += [block for block in blocks if kinds[type(block)] > 1]
    # What is within another block is gathered with it.
    inner = {id(child) for block in found for child in block.modules() if child is not block}
    return [block for block in dict.fromkeys(found) if id(block) not in inner]


def evaluated_together(module: nn.Module, batches: Iterable[T]) -> Iterator[T]:
    """Yield a process' evaluation batches; while others have more, gather parameters for them, as they do.

    A forward pass of sharded modules takes all processes. Those without a batch repeat what their last pass has
    gathered, and throw it away: no code of the module runs, so that nothing is counted twice. So all batches must
    take the same way through the sharded parts.

    Raises:
        MisconfigurationException: This process has no batch at all, while others have.
    """
    parts = [part for part in module.modules() if is_sharded(part)]
    if not parts:
        yield from batches
        return
    gathered: list[Callable[[], Any]] = []
    hooks = [hook for part in parts for hook in _noting(part, gathered)]
    root = module if is_sharded(module) else None
    iterator, began = iter(batches), False
    try:
        while distributed.any_of((batch := next(iterator, END)) is not END):
            if batch is END and not began:
                raise MisconfigurationException(NO_BATCH)
            if batch is END:
                for step in gathered:
                    step()
            else:
                # A step of the module, rather than its forward, gathers what is not in a block.
                began, gathered[:] = True, [] if root is None else [root.unshard]
                yield batch
            for part in parts:
                part.reshard()
    finally:
        for hook in hooks:
            hook.remove()


def _noting(part: Any, gathered: list[Callable[[], Any]]) -> list[RemovableHandle]:
    """Note what a forward pass of a part gathers, and lets go of again."""

    def before(*_: Any) -> None:
        gathered.append(part.unshard)

    def after(*_: Any) -> None:
        if _is_sharded(part):
            gathered.append(part.reshard)

    return [part.register_forward_pre_hook(before), part.register_forward_hook(after)]


def _is_sharded(part: nn.Module) -> bool:
    """Whether the parameters that a part gathers by itself are in parts now."""
    others = [other for other in part.modules() if other is not part and is_sharded(other)]
    inner = {id(p) for other in others for p in other.parameters()}
    return any(is_spread(p) for p in part.parameters() if id(p) not in inner)


def count_samples_once(module: nn.Module) -> None:
    """Have torchmetrics objects merge over the processes that have samples of their own."""
    for part in module.modules():
        if is_metric(part) and part.dist_sync_fn is None:
            part.dist_sync_fn = _gather_of_samples


def _gather_of_samples(result: Tensor, group: Any = None) -> list[Tensor]:
    from torchmetrics.utilities.distributed import gather_all_tensors

    return distributed.one_of_each_group(gather_all_tensors(result, group))


def clip_grad_norm(parameters: list[Tensor], most: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, also for gradients that are spread over processes, in whatever ways."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(is_spread(gradient) for gradient in gradients):
        nn.utils.clip_grad_norm_(parameters, most)
        return
    parts = [as_local(gradient) for gradient in gradients]
    norms = torch.stack([norm.float() if norm.dtype.itemsize < 4 else norm for norm in torch._foreach_norm(parts)])
    # What several processes have counts once.
    copies = torch.tensor([_copies(gradient) for gradient in gradients], device=norms.device)
    total = (norms.square() / copies).sum()
    torch.distributed.all_reduce(total)
    torch._foreach_mul_(parts, torch.clamp(most / (total.sqrt() + 1e-6), max=1.0).to(parts[0].dtype))


def _copies(tensor: Tensor) -> int:
    """How many processes have the same part of a tensor."""
    parts = 1
    if is_spread(tensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            parts *= 1 if placement.is_replicate() else size
    return distributed.world_size() // parts


def as_plain(tensor: Tensor) -> Tensor:
    """The whole of a tensor; for one that is spread over processes, all of them must ask."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def as_local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has; a view."""
    return tensor.to_local() if is_spread(tensor) else tensor


def as_like(value: Any, like: Any) -> Any:
    """A whole tensor, the same in all processes, spread as another one is; also one that is spread otherwise."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.shape != like.shape:
        return value
    if not is_spread(like):
        return as_plain(value)
    if is_spread(value):
        if value.device_mesh == like.device_mesh:
            return value.redistribute(like.device_mesh, like.placements)
        value = as_plain(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

"""What makes a run faster, with other rounding at most: memory format, torch.compile, and fused optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import engine

# Of an optimizer's step: one kernel for all parameters (fused), or a few (foreach).
FORMS = ("fused", "foreach")
DEVICES = ("cpu", "cuda")


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


def faster_form(cls: type[Optimizer], groups: list[dict[str, Any]]) -> dict[str, bool]:
    """What makes the step of an optimizer faster than torch's own choice, as arguments of its constructor.

    Adam and AdamW are fused: on a CPU that takes a half to an eighth of the time. The fused forms of the others are
    not as good as the usual ones: Adagrad's takes no sparse gradients, SGD's gains nothing without momentum, and with
    it fails where a parameter gets its first gradient later than others.

    Parameters that are spread over processes are handled together (foreach), where torch takes one after the other.

    Args:
        cls: The class.
        groups: The parameter groups.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not issubclass(cls, Adam):
        return {}
    if all(_can_be_fused(parameter) for parameter in parameters):
        return {"fused": True}
    meshes = {getattr(p, "device_mesh", None) for p in parameters}
    return {"foreach": True} if len(meshes) == 1 and None not in meshes else {}


def _can_be_fused(parameter: Tensor) -> bool:
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.layout is not torch.strided:
        return False
    # The kernel goes through memory, and takes the n-th numbers of a parameter, its gradient and its state for those
    # of the same place: so a parameter may have no gaps, which the other two would not have.
    dense = parameter.stride() == torch.empty_like(parameter, device="meta").stride()
    return dense and parameter.is_floating_point() and parameter.device.type in DEVICES


def keep_form(optimizer: Optimizer) -> None:
    """Have an optimizer keep its form when it is given the state of another: of older runs, or of other devices.

    A run that goes on on the same machine chooses the same form again, and so comes to the same bits.
    """
    optimizer.register_load_state_dict_pre_hook(_with_own_form)
    optimizer.register_load_state_dict_post_hook(_lay_out)
    if isinstance(optimizer, SGD) or not hasattr(engine, "trainer"):
        # Under fp16 the loss scaler, rather than the kernel, leaves steps out: SGD's would spoil its momentum, and
        # Lightning cannot clip gradients then.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def _with_own_form(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    own = [{name: group[name] for name in FORMS if name in group} for group in optimizer.param_groups]
    saved = state["param_groups"]
    if len(saved) != len(own):
        return state  # which torch refuses
    return {**state, "param_groups": [{**group, **form} for group, form in zip(saved, own, strict=True)]}


def _lay_out(optimizer: Optimizer) -> None:
    """Lay the state out in memory as the parameters are now: a checkpoint may be of a run with --channels_last."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items() if isinstance(parameter, Tensor) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

"""Optimizers of torch.optim by name, and learning-rate schedules."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, lr_scheduler

from engine import MisconfigurationException
from utils.acceleration import FORMS, faster_form, keep_form
from utils.fine_tuning import within
from utils.registry import classes, construct, pick

UNSUPPORTED = {"SparseAdam": "it takes sparse gradients only; override MInterface.configure_optimizers for it"}
# Arguments of optimizers that have flags of their own, or are ours to fill in.
TAKEN = {"params": "--freeze", "lr": "--lr", "weight_decay": "--weight_decay"}

# Of learning rates and factors of them: products of larger ones would be no numbers of float32.
HIGHEST = 1e6
# The number of optimizer steps done so far, to the factor of the learning rate.
Factor = Callable[[int], float]


def build_optimizer(
    net: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    arguments: Mapping[str, Any] | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """An optimizer for those parameters of a net that are to be trained.

    Parameters with fewer than two dimensions (biases, scales of norms) are not decayed, as is usual since "Bag of
    Tricks for Image Classification" (He et al. 2018). Where a form of it is faster and as exact, that one is taken
    (see `utils.acceleration`), unless the arguments choose.

    Args:
        net: The net.
        name: Name of the class in torch.optim.
        lr: Learning rate.
        weight_decay: Weight decay, in the sense of that optimizer.
        arguments: Its further keyword arguments.
        lr_scales: Factor of the learning rate for each prefix of parameter names; the longest prefix counts.

    Raises:
        MisconfigurationException: There is no such optimizer, it refuses the arguments, a prefix has no parameter, or
            no parameter is to be trained.
    """
    arguments = arguments or {}
    if not (0 < lr <= HIGHEST and 0 <= weight_decay <= HIGHEST):
        raise MisconfigurationException(
            f"--lr {lr} --weight_decay {weight_decay}: give an lr above 0 and a weight_decay from 0, up to {HIGHEST:g}"
        )
    if name in UNSUPPORTED:
        raise MisconfigurationException(f"--optimizer {name}: {UNSUPPORTED[name]}")
    for taken in set(TAKEN) & set(arguments):
        raise MisconfigurationException(f"--optimizer_args has {taken!r}; give {TAKEN[taken]} instead")
    cls = pick(name, classes(torch.optim, Optimizer), "--optimizer")
    if weight_decay and "weight_decay" not in inspect.signature(cls).parameters:
        raise MisconfigurationException(f"--optimizer {name} knows no weight decay; give --weight_decay 0")
    groups = _parameter_groups(net, lr, weight_decay, lr_scales or {})
    if cls is LBFGS and not all(parameter.is_contiguous() for group in groups for parameter in group["params"]):
        raise MisconfigurationException("--optimizer LBFGS takes weights in torch's usual format: no --channels_last")
    chosen = {} if arguments.keys() & {*FORMS, "differentiable"} else faster_form(cls, groups)
    optimizer: Optimizer = construct(cls, {**arguments, **chosen}, f"--optimizer {name}", params=groups, lr=lr)
    keep_form(optimizer)
    _try(net, cls, arguments, max(optimizer.param_groups, key=lambda group: float(group["lr"])))
    return optimizer


def _try(net: nn.Module, cls: type[Optimizer], arguments: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Take a step with a parameter of its own, because optimizers refuse some arguments only then."""
    weights = nn.Parameter(torch.zeros(2, 2, device=next(net.parameters()).device))
    weights.grad = torch.ones_like(weights)
    groups = [{"params": [weights], "lr": group["lr"], "weight_decay": group["weight_decay"]}]
    optimizer: Optimizer = construct(cls, arguments, "--optimizer", params=groups, lr=group["lr"])
    try:
        # Some, such as LBFGS, ask for the loss themselves.
        optimizer.step(lambda: 0.0)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MisconfigurationException(
            f"--optimizer {cls.__name__} fails with lr={group['lr']:g} and --optimizer_args {dict(arguments)}: {reason}"
        ) from error


def _parameter_groups(
    net: nn.Module, lr: float, weight_decay: float, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A group for each pair of a learning rate and a weight decay."""
    names = [name for name, _ in net.named_parameters()]
    for prefix, scale in scales.items():
        if not any(within(name, prefix) for name in names):
            raise MisconfigurationException(
                f"--lr_scales {prefix}: no parameter of the net begins so; its parts are: {', '.join(_parts(names))}"
            )
        if not 0 < scale <= HIGHEST:
            raise MisconfigurationException(
                f"--lr_scales {prefix}: {scale}; give a factor above 0, up to {HIGHEST:g} (to keep a part as it is: "
                f"--freeze {prefix})"
            )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            longest = max((prefix for prefix in scales if within(name, prefix)), key=len, default=None)
            scaled = lr if longest is None else lr * scales[longest]
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            group = groups.setdefault((scaled, decay), {"params": [], "lr": scaled, "weight_decay": decay})
            group["params"].append(parameter)
    if not groups:
        raise MisconfigurationException("no parameter of the net is to be trained: all are frozen, or there are none")
    return list(groups.values())


def _parts(names: list[str]) -> list[str]:
    """The top-level parts of a net, or those within its only one."""
    parts = list(dict.fromkeys(name.split(".")[0] for name in names))
    if len(parts) == 1 and all("." in name for name in names):
        return [f"{parts[0]}.{part}" for part in _parts([name.split(".", 1)[1] for name in names])]
    return parts


def build_schedule(
    optimizer: Optimizer,
    name: str,
    arguments: Mapping[str, Any] | None,
    warmup_steps: int,
    total_steps: float,
    steps_per_epoch: float,
    monitor: str | None = None,
    monitor_mode: str | None = None,
) -> list[dict[str, Any]]:
    """How the learning rate changes over the run, in the form that `configure_optimizers` may return.

    All but plateau are one factor function of the number of the step. So a run that is resumed with more epochs goes
    on along the longer curve, where torch's own CosineAnnealingLR would rise again and OneCycleLR raise an error.

    Args:
        optimizer: The optimizer.
        name: A key of `SCHEDULES`.
        arguments: Arguments of the schedule, those of the functions below; for plateau of torch's ReduceLROnPlateau.
        warmup_steps: Optimizer steps over which the learning rate first rises, from 1 / warmup_steps of itself.
        total_steps: Optimizer steps of the run; inf if it has no end.
        steps_per_epoch: Optimizer steps of an epoch; inf if it has no end.
        monitor: Logged value that plateau watches.
        monitor_mode: Whether less ("min") or more ("max") of it is better. Default: known by its name.

    Raises:
        MisconfigurationException: There is no such schedule, it refuses the arguments, or it needs an end.
    """
    arguments = arguments or {}
    if warmup_steps < 0 or warmup_steps and warmup_steps >= total_steps:
        raise MisconfigurationException(
            f"--warmup_steps {warmup_steps}: give a number from 0 that is less than the steps of the run, {total_steps}"
        )
    warmup = _warmup(warmup_steps)
    make = pick(name, SCHEDULES, "--lr_schedule")
    if name == "plateau":
        return _plateau(optimizer, arguments, warmup_steps, monitor, monitor_mode)
    start = warmup_steps if name in OVER_RUN else 0
    span = {**dict.fromkeys(OVER_RUN, total_steps - start), **dict.fromkeys(BY_EPOCH, steps_per_epoch)}.get(name, 1)
    if math.isinf(span):
        end = "an end: give --max_epochs or --max_steps" if name in OVER_RUN else "epochs: give --limit_train_batches"
        raise MisconfigurationException(f"--lr_schedule {name} needs {end}, or --lr_schedule constant")
    factor = construct(partial(make, max(math.ceil(span), 1)), arguments, f"--lr_schedule {name}")
    if name == "constant" and not warmup_steps:
        return []
    # torch keeps the attributes of callable objects in checkpoints, and none of functions: so a resumed run follows
    # the curve that is laid out here, not the one that was saved.
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(warmup(step) * factor(max(step - start, 0)), HIGHEST))
    return [{"scheduler": scheduler, "interval": "step"}]


def _plateau(
    optimizer: Optimizer, arguments: Mapping[str, Any], warmup_steps: int, monitor: str | None, mode: str | None
) -> list[dict[str, Any]]:
    from utils.metrics import usual_mode

    mode = mode or usual_mode(monitor or "loss")
    plateau = construct(
        lr_scheduler.ReduceLROnPlateau, arguments, "--lr_schedule plateau", optimizer=optimizer, mode=mode
    )
    schedulers: list[dict[str, Any]] = [
        {"scheduler": plateau, "interval": "epoch", "monitor": monitor, "strict": False}
    ]
    if warmup_steps:
        # It multiplies the learning rate from step to step, so that it and the plateau can change it by turns.
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps)
        schedulers.append({"scheduler": rise, "interval": "step"})
    return schedulers


def _warmup(steps: int) -> Factor:
    """From 1 / steps to 1, on a straight line."""
    return lambda step: 1.0 if step >= steps else (1 + (steps - 1) * step / steps) / steps


def _constant(_: int, /) -> Factor:
    return lambda step: 1.0


def _cosine(steps: int, /, final: float = 0.0) -> Factor:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017)."""
    _check("final", final, 0 <= final <= 1, "a factor from 0 to 1")
    return lambda step: _between(1.0, final, step / steps)


def _onecycle(steps: int, /, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4) -> Factor:
    """From 1 / `div_factor` to 1 within `pct_start` of the run, then down to almost 0 (Smith and Topin 2018).

    Both ways are half a cosine. The momentum stays as it is, unlike in torch's OneCycleLR.
    """
    _check("pct_start", pct_start, 0 <= pct_start <= 1, "a share from 0 to 1")
    _check("div_factor", div_factor, 1e-6 <= div_factor < math.inf, "a number from 1e-6")
    _check("final_div_factor", final_div_factor, 1e-6 <= final_div_factor < math.inf, "a number from 1e-6")
    start, peak, last = 1 / div_factor, pct_start * steps - 1, steps - 1

    def factor(step: int) -> float:
        if step <= peak:
            return _between(start, 1.0, step / peak if peak else 1.0)
        return _between(1.0, start / final_div_factor, (step - peak) / (last - peak) if last > peak else 1.0)

    return factor


def _step(steps_per_epoch: int, /, step_size: int, gamma: float = 0.1) -> Factor:
    """Times `gamma` every `step_size` epochs."""
    _check("step_size", step_size, step_size >= 1 and step_size == int(step_size), "a whole number of epochs from 1")
    _check("gamma", gamma, 0 < gamma < math.inf, "a number above 0")
    return lambda step: _power(gamma, step // steps_per_epoch // step_size)


def _multistep(steps_per_epoch: int, /, milestones: list[int], gamma: float = 0.1) -> Factor:
    """Times `gamma` at each of the epochs in `milestones`."""
    _check("milestones", milestones, all(m >= 1 and m == int(m) for m in milestones), "a list of epochs from 1")
    _check("gamma", gamma, 0 < gamma < math.inf, "a number above 0")
    epochs = sorted(milestones)
    return lambda step: _power(gamma, bisect_right(epochs, step // steps_per_epoch))


def _exponential(steps_per_epoch: int, /, gamma: float) -> Factor:
    """Times `gamma` every epoch."""
    _check("gamma", gamma, 0 < gamma < math.inf, "a number above 0")
    return lambda step: _power(gamma, step // steps_per_epoch)


# Schedules that stretch over the run, after the warmup; and those that count epochs, from the start of training.
OVER_RUN: dict[str, Callable[..., Factor]] = {"cosine": _cosine, "onecycle": _onecycle}
BY_EPOCH: dict[str, Callable[..., Factor]] = {"step": _step, "multistep": _multistep, "exponential": _exponential}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": _constant,
    **OVER_RUN,
    **BY_EPOCH,
    "plateau": lr_scheduler.ReduceLROnPlateau,
}


def _between(start: float, end: float, share: float) -> float:
    """The point on half a cosine from `start` to `end`, at a share of the way; past it, the end."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _power(base: float, exponent: int) -> float:
    try:
        return float(base) ** exponent
    except OverflowError:
        return math.inf


def _check(name: str, value: Any, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}={value}; give {allowed}")

"""One batch of training: gradients, and the optimizer's step, automatic, by a closure or by the module itself.

`t` is the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from engine import distributed
from engine.callback import Callback
from engine.evaluation import call_both
from engine.exceptions import MisconfigurationException
from engine.older import refuse_returned
from engine.optim import step_schedulers

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Methods of a module that say how gradients are clipped.
CLIPPING = frozenset(("configure_gradient_clipping", "clip_gradients"))
# Hooks without which gradients go to the optimizer as they are; fp16, which unscales them, brings an `optimizer_step`.
PREPARING = CLIPPING | {"on_before_optimizer_step", "optimizer_step"}
ZERO_GRAD = Optimizer.zero_grad
# What torch, and a scheduler of it, puts around the step of an optimizer, and where it keeps hooks.
SCHEDULING = vars(lr_scheduler)
RECORDED = Optimizer.profile_hook_step(Optimizer.step).__code__
PRE, POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
GLOBAL_HOOKS = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


def forward_backward(t: Trainer, batch: Any, batch_idx: int) -> dict[str, Any]:
    """Add the gradients of one batch.

    Gradients of the previous window are cleared between forward and backward, as in Lightning.

    Returns:
        What `on_train_batch_end` gets: the loss, divided by the accumulation, and the step's other values. On the CPU
        the loss is still to be detached, which only a hook needs; elsewhere, its graph is not to outlive this.
    """
    step, given = t.strategy.training_step, (batch, batch_idx) if t.takes_batch_idx["training_step"] else (batch,)
    if t.precision_plugin.plain:
        output = step(*given)
    else:
        with t.precision_plugin.context:
            output = step(*given)
    loss, extra = _split_output(output)
    if batch_idx % t.accumulate_grad_batches == 0:
        optimizer = t.optimizers[0]
        if "on_before_zero_grad" in t.hooked:
            call_both(t, Callback.on_before_zero_grad, optimizer)
        own_way = type(optimizer).zero_grad is not ZERO_GRAD or "zero_grad" in vars(optimizer)
        if own_way or "optimizer_zero_grad" in t.hooked:
            clear = t.module_hooks.get("optimizer_zero_grad", t.module.optimizer_zero_grad)
            clear(t.state.epoch, batch_idx, optimizer)
        else:
            # What torch's does, too, which takes longer to tell its profiler of it than to do it.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
    if loss is None:
        if not distributed.active():
            return extra
        raise MisconfigurationException(
            "training_step returned None, but other processes wait for its gradients; return a loss of 0 * outputs"
        )
    if t.accumulate_grad_batches > 1:
        loss = loss / t.accumulate_grad_batches
    backward(t, loss)
    return {"loss": loss if loss.is_cpu and "backward" not in t.hooked else loss.detach(), **extra}


def backward(t: Trainer, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Differentiate a loss, scaled under fp16, with the hooks around it."""
    if t.precision_plugin.scaler is not None:
        loss = t.precision_plugin.scaler.scale(loss)
    if "on_before_backward" in t.hooked:
        call_both(t, Callback.on_before_backward, loss)
    if "backward" in t.hooked:
        t.steps["backward"](loss, *args, **kwargs)
    else:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
    if "on_after_backward" in t.hooked:
        call_both(t, Callback.on_after_backward)


def prepare_gradients(t: Trainer, optimizer: Optimizer) -> None:
    """Make gradients ready for the optimizer: their true size, and clipped."""
    module = t.module
    if not module.automatic_optimization:
        distributed.average_gradients([p for group in optimizer.param_groups for p in group["params"]])
    t.precision_plugin.unscale(optimizer)
    window = t.state.batches_done % t.accumulate_grad_batches + 1
    if window < t.accumulate_grad_batches:
        # Every loss was divided by the full window, but this one, at the epoch's end, is shorter.
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, t.accumulate_grad_batches / window)
    if "on_before_optimizer_step" in t.hooked:
        call_both(t, Callback.on_before_optimizer_step, optimizer)
    if module.automatic_optimization and (t.gradient_clip_val or not CLIPPING.isdisjoint(t.hooked)):
        module.configure_gradient_clipping(optimizer, t.gradient_clip_val, t.gradient_clip_algorithm)


def step_unrecorded(optimizer: Optimizer) -> None:
    """What `optimizer.step()` does, without what torch has around it for hooks and its profiler where there are none.

    To tell the profiler of a step takes longer than all that the engine does in one.
    """
    whole, kept = type(optimizer).step, vars(optimizer)
    # By type, since proxies pass for what they stand for.
    plain = type(whole) is FunctionType and whole.__code__ is RECORDED
    if plain and (own := kept.get("step")) is not None:
        # A scheduler of torch has put its own around it, to note that there was a step.
        plain = type(own) is FunctionType and own.__globals__ is SCHEDULING and vars(own).get("__wrapped__") is whole
    if plain and not any((torch.autograd.profiler._is_profiler_enabled, kept.get(PRE), kept.get(POST), *GLOBAL_HOOKS)):
        optimizer._opt_called = True  # type: ignore[attr-defined]
        vars(whole)["__wrapped__"](optimizer)
    else:
        optimizer.step()


def step_optimizer(t: Trainer, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
    """What `LightningOptimizer.step` does: compute gradients by the closure, make them ready, update the weights."""

    def prepared() -> Any:
        loss = None if closure is None else closure()
        prepare_gradients(t, optimizer)
        return loss

    result = t.steps["optimizer_step"](optimizer, prepared, **kwargs)
    t.state.global_step += not t.module.automatic_optimization
    return result


def step_by_closure(t: Trainer, batch: Any, batch_idx: int) -> dict[str, Any]:
    """Let the module's `optimizer_step`, or an optimizer such as LBFGS, run a batch as often as it likes."""
    outputs: dict[str, Any] | None = None

    def closure() -> Tensor | None:
        nonlocal outputs
        with torch.enable_grad():
            outputs = detached(forward_backward(t, batch, batch_idx))
        return outputs.get("loss")

    t.module.optimizer_step(t.state.epoch, batch_idx, t.lightning_optimizers[0], closure)
    if outputs is None:
        raise MisconfigurationException(
            "optimizer_step did not run its closure; call optimizer.step(closure=optimizer_closure) in it, or at least "
            "optimizer_closure()"
        )
    return outputs


def manual_step(t: Trainer, batch: Any, batch_idx: int) -> dict[str, Any]:
    """Run a training step that computes gradients and steps optimizers itself; returns its values, detached."""
    with t.precision_plugin.context:
        output = t.strategy.training_step(*((batch, batch_idx) if t.takes_batch_idx["training_step"] else (batch,)))
    if output is not None and not isinstance(output, Tensor | Mapping):
        raise MisconfigurationException(
            f"training_step returned {type(output).__name__}; return a tensor, a dict, or None"
        )
    return detached({} if output is None else dict(output) if isinstance(output, Mapping) else {"loss": output})


def detached(outputs: dict[str, Any]) -> dict[str, Any]:
    """What a training step has given, with its loss, if that is a tensor, cut off from what it was computed from."""
    loss = outputs.get("loss")
    return {**outputs, "loss": loss.detach()} if isinstance(loss, Tensor) and loss.requires_grad else outputs


def step_learning_rates(t: Trainer, unit: str, count: int, plateau: bool = False) -> None:
    """Step the schedulers of a unit: those that follow the clock, or those that follow a value."""
    if t.module.automatic_optimization:
        store = t.metrics if plateau else None
        step_schedulers(t.module.lr_scheduler_step, t.lr_scheduler_configs, unit, count, store)


def _split_output(output: Any) -> tuple[Tensor | None, dict[str, Any]]:
    if output is None:
        return None, {}
    loss, extra = output, dict[str, Any]()
    if not isinstance(output, Tensor) and isinstance(output, Mapping):
        refuse_returned("training_step", output)
        loss = output.get("loss")
        extra = {name: value for name, value in output.items() if name != "loss"}
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"training_step returned {type(output).__name__}; return the loss (a tensor), a dict with 'loss', or None"
        )
    if loss.numel() != 1 or not loss.requires_grad:
        fault = f"of shape {tuple(loss.shape)}" if loss.numel() != 1 else "without gradient"
        raise MisconfigurationException(f"training_step returned a loss {fault}; return one number with a gradient")
    return loss, extra

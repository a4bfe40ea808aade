"""Notes every hook that an engine calls on user code: one line of text per call, the same for both engines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import Tensor
from torch.optim import Optimizer

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# Overriding one of these takes our engine off its short path: every scenario runs with and without them.
CLOSURES = ("optimizer_step", "lr_scheduler_step")
CONFIGURE = ("configure_optimizers", "configure_callbacks", "configure_gradient_clipping")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
# Not called unless they are overridden, and then they replace something.
REPLACING = ("configure_sharded_model", "on_validation_model_train", "on_test_model_train", "on_predict_model_train")


def _public(*classes: type) -> list[str]:
    names = [name for cls in classes for name, value in vars(cls).items() if callable(value) and name[0] != "_"]
    return [name for name in names if name not in REPLACING]


DATA_HOOKS = _public(DataHooks)
MODULE_HOOKS = [*_public(ModelHooks, DataHooks, CheckpointHooks), *STEPS, *CONFIGURE, "backward", "optimizer_zero_grad"]
DATAMODULE_HOOKS = [*DATA_HOOKS, "state_dict", "load_state_dict", "on_exception"]
CALLBACK_HOOKS = _public(lightning.Callback)
# Means are added up in float64 here, in float32 there.
TOLERANCE = 2e-6
# Hooks within a training batch, where gradients and learning rates are noted, too.
WITH_GRADIENTS = ("on_before_zero_grad", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
WITH_RATES = ("on_train_batch_end", "on_train_epoch_end", "on_train_end")


def brief(value: Any) -> str:
    """A value in a few words that are equal if, and only if, both engines gave the same."""
    if isinstance(value, Tensor):
        numbers = value.detach().double()
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"{shape}:{float(numbers.sum()):.9g}{'+grad' if value.requires_grad else ''}"
    if isinstance(value, Mapping):
        if "state_dict" in value and "global_step" in value:
            return f"checkpoint(epoch={value['epoch']}, global_step={value['global_step']})"
        return "{" + ", ".join(f"{key}: {brief(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(brief, value)) + "]"
    if isinstance(value, Optimizer):
        # Lightning wraps optimizers in a subclass of their own class.
        return next(cls.__name__ for cls in value.__class__.__mro__ if cls.__module__.startswith("torch.optim"))
    if isinstance(value, BaseException):
        return "error"  # its type is compared at the end; what it says is each engine's own
    if isinstance(value, str | torch.device):
        return str.__str__(value) if isinstance(value, str) else str(value)  # Lightning's stages are an enumeration
    if isinstance(value, bool | int | float | None):
        return repr(value)
    return "function" if inspect.isroutine(value) or type(value).__name__ == "Closure" else type(value).__name__


def recorded(base: type, owner: str, names: Iterable[str], note: Callable[[str, str, Any], None]) -> type:
    """A subclass of `base` in which each of the methods `names` is noted as `owner.name(arguments)`, then run.

    Args:
        base: A Module, DataModule or Callback, of either engine.
        owner: One letter that stands for it.
        names: Hooks; those that the engine does not have are left out, and steps and loaders that the user has not
            written, since their mere presence changes what runs.
        note: Takes the call as text, the name of the hook, and its owner.
    """

    def method(name: str) -> Callable[..., Any]:
        plain = getattr(base, name)
        signature = inspect.signature(_reference(owner, name) or plain)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs).arguments
            given = [
                f"{key}={brief(value)}" for key, value in bound.items() if key not in ("self", "trainer", "pl_module")
            ]
            note(f"{owner}.{name}({', '.join(given)})", name, self)
            return plain(self, *args, **kwargs)

        # Not by functools.wraps: both engines would take a wrapped method for one that is not overridden.
        hook.__name__, hook.__signature__ = name, inspect.signature(plain)  # type: ignore[attr-defined]
        return hook

    libraries = ("engine", "pytorch_lightning", "torch", "builtins")
    own = [cls for cls in base.__mro__ if cls.__module__.split(".")[0] not in libraries]
    written = {name for cls in own for name in vars(cls)}
    wanted = [n for n in names if hasattr(base, n) and (n in written or n not in (*STEPS, *LOADERS))]
    return type(base.__name__, (base,), {name: method(name) for name in wanted})


def _reference(owner: str, name: str) -> Any:
    """Lightning's own method, whose names of arguments count for both; none for steps, which users declare."""
    base = {"M": lightning.LightningModule, "D": lightning.LightningDataModule}.get(owner[0], lightning.Callback)
    return None if name in STEPS else getattr(base, name)


def state(trainer: Any, module: Any, name: str) -> str:
    """What a hook can see of the run: step, epoch, modes; in some also gradients and learning rates."""
    flags = [f"step={trainer.global_step}", f"epoch={trainer.current_epoch}"]
    if name in (*LOADERS, "on_exception", ""):
        # In which mode a loader is requested, an error reported or a value logged is no business of theirs.
        return " ".join(flags)
    flags += [
        *(["train"] if module.training else []),
        *(["grad"] if torch.is_grad_enabled() else []),
        *(["inference"] if torch.is_inference_mode_enabled() else []),
        *(["sanity"] if trainer.sanity_checking else []),
        *(["stop"] if trainer.should_stop else []),
    ]
    if "train_batch" in name:
        flags += ["last"] * bool(trainer.is_last_batch)
    if name in WITH_GRADIENTS:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flags.append(f"gradient={sum(float(g.double().sum()) for g in gradients):.9g}" if gradients else "no gradient")
    if name in WITH_RATES:
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups if g["params"][0].requires_grad]
        flags.append("lr=" + ",".join(f"{group['lr']:.9g}" for group in groups))
    return " ".join(flags)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two nested structures differ: tensors count to the last bit, numbers but for their last digits."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = dict.fromkeys([*theirs, *ours])
        missing = object()
        return [d for n in names for d in differences(ours.get(n, missing), theirs.get(n, missing), f"{path}/{n}")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{path}[{n}]")]
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        same = ours.dtype == theirs.dtype and bool(torch.equal(ours, theirs))
    elif isinstance(ours, float) and isinstance(theirs, float | int):
        close = math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=1e-7)
        same = close or (math.isnan(ours) and math.isnan(theirs))
    else:
        same = bool(ours == theirs)
    shown = ["nothing" if type(value) is object else repr(value) for value in (ours, theirs)]
    return [] if same else [f"{path}: {shown[0]} here, {shown[1]} in Lightning"]

"""Programs written for earlier versions of Lightning: what of them works, and what to write instead of the rest."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.callback import Callback
from engine.distributed import rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.hooks import convert
from engine.older_names import ARGUMENTS, MODULES, NAMES, TRAINER, TYPES, VALUES

if TYPE_CHECKING:
    from engine.module import Module
    from engine.trainer import Trainer

# Stages as older hooks and as those of callbacks name them.
STAGES = {"training": "train", "validation": "validation", "test": "test"}
OLDER_HOOKS = [f"{stage}_{moment}_end" for stage in STAGES for moment in ("epoch", "step")]


class OlderHooks(Callback):
    """Calls a module's `training_epoch_end`, `validation_epoch_end` and `test_epoch_end` with what the steps returned.

    Losses are not divided by the accumulation, as until Lightning 1.4.
    """

    def __init__(self, module: Module) -> None:
        # For each stage a list for each loader; only for hooks that are written, since outputs take memory.
        self.outputs: dict[str, list[list[Any]]] = {}
        for stage, name in STAGES.items():
            if _has(module, f"{stage}_epoch_end"):
                setattr(self, f"on_{name}_epoch_start", partial(self._begin, stage))
                setattr(self, f"on_{name}_batch_end", partial(self._keep, stage))
                setattr(self, f"on_{name}_epoch_end", partial(self._end, stage))

    def _begin(self, stage: str, trainer: Trainer, pl_module: Module) -> None:
        loaders = 1 if stage == "training" else len(trainer.evaluation_loaders(stage).readers)
        self.outputs[stage] = [[] for _ in range(loaders)]

    def _keep(self, stage: str, trainer: Trainer, _: Module, outputs: Any, batch: Any, i: int, loader: int = 0) -> None:
        if stage not in self.outputs:
            rank_zero_warn(
                "training_epoch_end gets the outputs since the run was resumed: those of before, in the same epoch, "
                "are in no checkpoint; what self.log(..., on_epoch=True) has logged is complete"
            )
            self.outputs[stage] = [[]]
        if stage == "training" and "loss" in outputs and trainer.accumulate_grad_batches > 1:
            outputs = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        if outputs is not None and (stage != "training" or outputs):
            self.outputs[stage][loader].append(convert(outputs, Tensor.detach))

    def _end(self, stage: str, trainer: Trainer, pl_module: Module) -> None:
        kept, name = self.outputs.pop(stage), f"{stage}_epoch_end"
        refuse_returned(name, getattr(pl_module, name)(kept[0] if len(kept) == 1 else kept))


def with_older_hooks(module: Module, callbacks: list[Callback]) -> list[Callback]:
    """The callbacks and, before them, what calls the older hooks of a module that has some."""
    others = [callback for callback in callbacks if not isinstance(callback, OlderHooks)]
    return [OlderHooks(module)] * any(_has(module, f"{stage}_epoch_end") for stage in STAGES) + others


def steps_of(module: Module) -> dict[str, Callable[..., Any]]:
    """The steps of a module by stage, each with its `*_step_end`, if it has one: that may change what is returned."""
    steps: dict[str, Callable[..., Any]] = {stage: getattr(module, f"{stage}_step") for stage in (*STAGES, "predict")}
    ends = {stage: getattr(module, f"{stage}_step_end") for stage in STAGES if _has(module, f"{stage}_step_end")}
    return steps | {stage: _with_end(steps[stage], end) for stage, end in ends.items()}


def _has(module: Module, hook: str) -> bool:
    return callable(getattr(module, hook, None))


def _with_end(step: Callable[..., Any], end: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(step)
    def run(*args: Any) -> Any:
        output = step(*args)
        changed = end(output)
        return output if changed is None else changed

    return run


def refuse_returned(hook: str, returned: Any) -> None:
    """Refuse a dict by which older versions logged.

    Raises:
        MisconfigurationException: A step or `*_epoch_end` of a module returned one.
    """
    values = returned if isinstance(returned, Mapping) else {}
    if any(isinstance(values.get(key), dict) for key in ("log", "progress_bar")) or (values and "epoch" in hook):
        keys, rest = ", ".join(map(repr, values)), "the loss" if hook == "training_step" else "nothing"
        raise MisconfigurationException(
            f"{hook} returns a dict of {keys}; log values by self.log(name, value), prog_bar=True for the progress "
            f"bar, and return {rest}"
        )


def refuse_arguments(taker: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that a function or class does not take.

    Raises:
        MisconfigurationException: There are some; the message has what to write instead of each.
    """
    known = [p.name for p in inspect.signature(taker).parameters.values() if p.kind is not p.VAR_KEYWORD]
    older, parts = ARGUMENTS.get(taker.__name__, {}), []
    for name, value in given.items():
        guess = "".join(f"did you mean {near}?" for near in difflib.get_close_matches(name, known, 1)) or "leave it out"
        parts.append(f"{name}={_show(value)}: {_fill(older.get(name, guess), name, value)}")
    if parts:
        raise MisconfigurationException(f"{taker.__name__} has no argument {'; and no '.join(parts)}")


def refuse_values(**given: Any) -> None:
    """Refuse values of the Trainer's arguments that only older versions knew.

    Raises:
        MisconfigurationException: There is one; the message has what to write instead.
    """
    for name, value in given.items():
        advice = VALUES.get((name, "dict" if isinstance(value, dict) else str(value)))
        if advice is not None:
            raise MisconfigurationException(f"{name}={_show(value)} is of older versions; {_fill(advice, name, value)}")


def _fill(advice: str, name: str, value: Any) -> str:
    return advice.replace("{name}", name).replace("{value}", _show(value))


def _show(value: Any) -> str:
    """A value as it is written in a program, if that is short."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text and "<" not in text else "..."


class RemovedAttribute(MisconfigurationException, AttributeError):
    """An older attribute was asked for; it is an AttributeError, too, so that `hasattr` works."""


class MissingName(MisconfigurationException, ImportError):
    """A name was asked for that is not here; it is an ImportError, too, so that programs can go without."""


class _Removed:
    def __init__(self, message: str) -> None:
        self.message = message

    def __get__(self, *_: object) -> Any:
        raise RemovedAttribute(self.message)


class _OlderModule(ModuleType):
    """A module of Lightning's that is none here: its names are found where they are now."""

    def __getattr__(self, name: str) -> Any:
        return _find(self.__name__, name)


def _find(module: str, name: str) -> Any:
    """What an older name in a module stands for.

    A refusal is no AttributeError: `from engine import TrainResult` would turn that into an ImportError of its own.
    """
    if f"{module}.{name}" in sys.modules:
        return sys.modules[f"{module}.{name}"]
    if name in NAMES:
        raise MissingName(f"{module}.{name} is not here; {NAMES[name]}")
    if module.startswith("engine.metrics") and not name.startswith("_"):
        metrics = import_module("torchmetrics.functional" if ".functional" in module else "torchmetrics")
        if name in metrics.__all__:
            advice = f"write {metrics.__name__}.{name}, with task= and num_classes= for a classification"
            raise MissingName(f"{module}.{name} is not here; {advice}")
    if isinstance(sys.modules[module], _OlderModule) and name in TYPES:
        return Any
    places = ("engine", "engine.callbacks", "engine.loggers", "engine.profilers", "engine.distributed")
    for place in places if isinstance(sys.modules[module], _OlderModule) else ():
        if name in vars(sys.modules.get(place, ModuleType)) and not name.startswith("_"):
            return vars(sys.modules[place])[name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def find_older_names(trainer: type[Trainer]) -> None:
    """From now on, find or refuse older names that modules of the engine, or its Trainer, are asked for."""
    for name in MODULES:
        sys.modules.setdefault(f"engine.{name}", _OlderModule(f"engine.{name}"))
    for module in ("", "callbacks", "loggers", "metrics", "strategies", "utilities"):
        name = f"engine.{module}".rstrip(".")
        vars(sys.modules[name])["__getattr__"] = partial(_find, name)
    for name, advice in TRAINER.items():
        setattr(trainer, name, _Removed(f"Trainer.{name} is not here; {advice}"))

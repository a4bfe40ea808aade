"""Hooks as they were written: names that nobody would call, and signatures that do not fit, end a run at its start."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from engine.callback import Callback
from engine.datamodule import DataModule
from engine.distributed import rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.hooks import is_overridden
from engine.module import Module
from engine.older import OLDER_HOOKS, refuse_returned
from engine.older_names import HOOKS, PARAMETERS

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Names that an argument may have in the place of another one.
_FREE = ("outputs", "results")
# What is called by name.
_HOOK = re.compile(
    r"on_.*|configure_.*|setup|teardown|prepare_data|.*_step|.*_dataloader|.*_batch_to_device|backward|"
    r"optimizer_zero_grad|state_dict|load_state_dict"
)


def check_hooks(thing: Module | DataModule | Callback) -> None:
    """Look through the methods of a module, data module or callback.

    Raises:
        MisconfigurationException: One looks like a hook and is none, cannot be called as its hook is, or returns what
            only older versions took.
    """
    base = next((base for base in (Module, DataModule, Callback) if isinstance(thing, base)), None)
    if base is None:
        raise MisconfigurationException(f"callbacks has a {thing!r:.80}; give objects of subclasses of engine.Callback")
    own = type(thing).__mro__[: type(thing).__mro__.index(base)]
    functions = inspect.getmembers(base, inspect.isfunction)
    hooks: dict[str, Callable[..., Any]] = {
        name: f for name, f in functions if _HOOK.fullmatch(name) and f.__module__.startswith("engine.")
    }
    hooks |= dict.fromkeys(OLDER_HOOKS, _older_hook) if isinstance(thing, Module) else {}
    _check_names(base, own, list(hooks))
    for name, reference in hooks.items():
        if is_overridden(thing, name, base) and callable(hook := getattr(thing, name)):
            owner = next((cls for cls in own if name in vars(cls)), type(thing)).__name__
            _check_signature(f"{owner}.{name}", hook, *_arguments(name, reference))
            if name == "on_save_checkpoint" if base is Callback else name.endswith(("_step", "_epoch_end")):
                _check_returned(owner, name, hook)
    if getattr(thing, "truncated_bptt_steps", 0):
        raise MisconfigurationException(f"{type(thing).__name__}.truncated_bptt_steps: {HOOKS['tbptt_split_batch']}")


def _older_hook(self: Module, outputs: Any) -> None: ...


def _check_names(base: type, own: Sequence[type], hooks: list[str]) -> None:
    """Refuse methods of classes that look like hooks of `base` and are none."""
    members = [(cls, name, value) for cls in own for name, value in vars(cls).items()]
    for cls, name, method in (member for member in members if isinstance(member[2], FunctionType)):
        nearest = _nearest(name, tuple(hooks))
        like_a_hook = name.startswith("on_") or (nearest and not re.search(r"^_|\d", name))
        if hasattr(base, name) or name in hooks or not (like_a_hook or name in HOOKS):
            continue
        # What other members of the class call is its own affair.
        others = [value for _, other, value in members if other != name]
        if any(name in _names_in(value) or _holds(value, method) for value in others):
            continue
        guess = f"; {HOOKS[name]}" if name in HOOKS else f"; did you mean {nearest[0]}?" if nearest else ""
        message = f"{cls.__name__}.{name} would never be called: {base.__name__} has no hook of that name{guess}"
        # It may be meant otherwise: where it is like no hook, and in classes that know nothing of the engine.
        if not guess or not issubclass(cls, base):
            rank_zero_warn(message)
            continue
        raise MisconfigurationException(message)


def _holds(value: Any, method: FunctionType) -> bool:
    """Whether a member of a class is the same method under another name, or has it inside."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return any(getattr(one, "func", one) is method for one in inside)


@cache
def _nearest(name: str, hooks: tuple[str, ...]) -> list[str]:
    """The hook that a name is most like, if it is like one."""
    spelt = name.replace("on_val_", "on_validation_")
    return difflib.get_close_matches(spelt, hooks, 1, 0.6 if name.startswith("on_") else 0.92)


def _names_in(value: Any) -> set[Any]:
    """Names and texts in a function, method or property, and in functions within it."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    code = value if isinstance(value, CodeType) else getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return set()
    inner = [_names_in(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}.union(*inner)


@cache
def _arguments(name: str, reference: Callable[..., Any]) -> tuple[list[str], int]:
    """What a hook is called with, and how many of it it has to take."""
    _, *given = (p for p in inspect.signature(reference).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in given]
    if names[:2] == ["batch", "batch_idx"] and name.endswith("_step"):
        return names[:2] + ["dataloader_idx"] * (name != "training_step"), 1
    optional = names[-1:] == ["dataloader_idx"] and given[-1].default is not inspect.Parameter.empty
    return names, len(names) - optional


def _check_signature(where: str, hook: Callable[..., Any], names: list[str], least: int) -> None:
    """Compare a hook with what it is called with: by position, and by name where it uses the same names."""
    taken = inspect.signature(hook)
    # What stands around a hook may give it more than it is given.
    if hasattr(hook, "__wrapped__") and any(p.kind is p.VAR_POSITIONAL for p in _around(hook).parameters.values()):
        return
    own = [p.name for p in taken.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fits = any(_binds(taken, count) for count in range(least, len(names) + 1))
    moved = any(n in names and names.index(n) != position for position, n in enumerate(own))
    extra = [n for position, n in enumerate(own) if n not in names and (position >= len(names) or n not in _FREE)]
    old = [n for n in extra if n in PARAMETERS and names != ["state_dict"]]
    # With a default, these two do no harm.
    if fits and not moved and set(old) <= {"unused", "dataloader_idx"}:
        return
    advice = [f"write def {where.partition('.')[2]}({', '.join(['self', *names])})"]
    advice += [f"instead of {n}, {PARAMETERS[n]}" for n in old if PARAMETERS[n]]
    raise MisconfigurationException(f"{where} takes ({', '.join(taken.parameters)}); {'; '.join(advice)}")


def _around(hook: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(hook, follow_wrapped=False)


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def check_dataloader_idx(t: Trainer, stage: str) -> None:
    """Compare steps and batch hooks of "validation", "test" or "predict" with the number of loaders.

    Raises:
        MisconfigurationException: One needs a `dataloader_idx`, and there is one loader, or the other way round.
    """
    several = len(t.evaluation_loaders(stage).readers) > 1
    names = (f"{stage}_step", f"on_{stage}_batch_start", f"on_{stage}_batch_end")
    things = [(t.module, Module), *((callback, Callback) for callback in t.callbacks)]
    for thing, base, name in (
        (thing, base, n) for thing, base in things for n in names if is_overridden(thing, n, base)
    ):
        taken, (given, least) = inspect.signature(getattr(thing, name)), _arguments(name, getattr(base, name))
        if not any(_binds(taken, count) for count in ([len(given)] if several else range(least, len(given)))):
            raise MisconfigurationException(
                f"{type(thing).__name__}.{name} takes ({', '.join(taken.parameters)}), but there "
                f"{'are several loaders' if several else 'is one loader'}; write dataloader_idx=0 as its last argument"
            )


def _check_returned(owner: str, name: str, hook: Callable[..., Any]) -> None:
    """Refuse what older versions took from a hook, as far as its source is known: a dict to log, a callback's state."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(hook)))
    except (OSError, TypeError, SyntaxError):
        return
    for value in _returned(tree.body[0]):
        if name != "on_save_checkpoint":
            items = zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ()
            logged: dict[Any, Any] = {
                k.value: {} if isinstance(v, ast.Dict) else v for k, v in items if isinstance(k, ast.Constant)
            }
            refuse_returned(name, logged)
        # A call is taken for that of the parent.
        elif not isinstance(value, ast.Call | ast.Constant):
            raise MisconfigurationException(f"{owner}.{name} returns a state; write state_dict(self), which returns it")


def _returned(node: ast.AST) -> list[ast.expr]:
    """The values that a function returns, without those of functions within it."""
    found = [node.value] if isinstance(node, ast.Return) and node.value is not None else []
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    return found + [v for child in ast.iter_child_nodes(node) if not isinstance(child, inner) for v in _returned(child)]

"""Flags: from the arguments of constructors; which types there can be, and how help and messages show them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

import engine

PLAIN = (int, float, str, bool, type(None))
# Decided by main.py, or of no use on a command line.
# The command line has logs, so that barebones is for programs.
NO_FLAGS = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "barebones", "model", "data"}
# Where a first run wants other values than the Trainer has.
DEFAULTS = {"max_epochs": 15, "log_every_n_steps": 10}
# Alternatives that help shows of a type.
MOST = 7
# Flags for some commands only; a run's config does not have them.
OF_COMMANDS = {"input": ("predict",), "output": ("predict", "export"), "formats": ("export",)}
OF_COMMANDS |= {"find_lr": ("fit",), "find_batch_size": ("fit",)}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_list(hint: Any, only: bool = False) -> bool:
    """Whether a value may be given as a list; with `only`, whether even a single word is one."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    lists = [get_origin(part) in (list, tuple) for part in parts]
    return get_origin(hint) in (list, tuple) or (all(lists) and bool(lists) if only else any(lists))


def is_plain(hint: Any) -> bool:
    """Whether a type is built of numbers, strings, booleans and containers of them: no class, no callable."""
    if get_origin(hint) is Literal or hint in PLAIN:
        return True
    inner = [part for part in get_args(hint) if part is not Ellipsis and not (get_origin(hint) is dict and part is Any)]
    return get_origin(hint) in (Union, types.UnionType, list, tuple, dict) and all(map(is_plain, inner))


def plain_part(hint: Any) -> Any:
    """Of the types of a union, those that a flag can give: the text of `str | timedelta | None`, say."""
    parts = [part for part in get_args(hint) if is_plain(part)]
    return Union[tuple(parts)] if parts and get_origin(hint) in (Union, types.UnionType) else hint  # noqa: UP007


def without_any(hint: Any) -> Any:
    """The same type with bare dicts: of a class that is named in a dict of Any, jsonargparse imports the module."""
    parts = get_args(hint)
    if get_origin(hint) is dict and Any in parts:
        return dict
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(without_any, parts))]  # noqa: UP007
    return get_origin(hint)[tuple(map(without_any, parts))] if get_origin(hint) in (list, tuple, dict) else hint


def metavar(hint: Any) -> str:
    """How help shows a value of a type."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(map(str, parts))
    if get_origin(hint) in (Union, types.UnionType):
        words = list(dict.fromkeys(word for part in parts for word in metavar(part).split("|")))
        return "|".join([*words[:MOST], "..."] if len(words) > MOST else words)
    if get_origin(hint) in (list, tuple):
        return f"{metavar(parts[0])} ..."
    names: dict[Any, str] = {int: "N", float: "X", str: "TEXT", bool: "true|false", dict: "{...}"}
    return names[get_origin(hint) or hint]


def spell(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ", ".join(map(str, parts))
    if kind is list and get_origin(parts[0]) is Literal:
        return f"some of {spell(parts[0])}"
    if kind in (Union, types.UnionType):
        choices = ", ".join(
            dict.fromkeys(str(v) for part in parts if get_origin(part) is Literal for v in get_args(part))
        )
        shown = [part for part in parts if part is not int or float not in parts]
        return " or ".join(dict.fromkeys(choices if get_origin(part) is Literal else spell(part) for part in shown))
    if kind in (list, tuple):
        example = {int: "1, 2, 3", float: "0.1, 0.2, 0.3"}.get(parts[0], "a, b, c")
        return f"a list such as [{example}]"
    if dict in (hint, kind):
        return f"a mapping such as {{a: {0.1 if float in parts else 1}}}"
    return words[hint]


def add_constructor(
    group: Any, cls: type[Any], prefix: str, skip: Iterable[str] = (), later: Mapping[str, str] | None = None
) -> None:
    """Add a flag for each argument of a constructor that has a plain type, with help from the docstring.

    Args:
        group: Where to add them.
        cls: Whose constructor.
        prefix: What the flags begin with.
        skip: Arguments without a flag.
        later: Arguments whose default is decided later, and by what.
    """
    texts = [cls.__doc__, cls.__init__.__doc__]
    described = [param for text in texts if text for param in docstring_parser.parse(text).params]
    help_texts = {param.arg_name: " ".join((param.description or "").split()) for param in described}
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):
        # A name that only type checkers import: the defaults tell the types.
        hints = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        hint = plain_part(hints.get(name, type(parameter.default)))
        if name in skip or (not prefix and name in NO_FLAGS) or parameter.kind not in NAMED:
            continue
        required = parameter.default is parameter.empty
        if not is_plain(hint) or hint is type(None):
            if required:
                raise engine.MisconfigurationException(
                    f"{cls.__name__} needs {name}, which no flag can give: annotate it with int, float, str, bool, or "
                    "lists of these, or give it a default"
                )
            continue
        options: dict[str, Any] = {"type": without_any(hint), "help": help_texts.get(name, "").replace("%", "%%")}
        if name in (later or {}):
            described_default = f"{options['help']} Default: {(later or {})[name]}."
            options |= {"type": without_any(hint | None), "default": None, "help": described_default}
        elif required:
            options["required"] = True
        else:
            options["default"] = DEFAULTS.get(prefix + name, parameter.default)
            if prefix + name in DEFAULTS:
                options["help"] = options["help"].partition(" Default:")[0]
        if options.get("default") is not None:
            shown = str(options["default"])
            options["help"] += f" [{shown.lower() if isinstance(options['default'], bool) else shown}]"
        group.add_argument(f"--{prefix}{name}", metavar=metavar(hint), **options)


def add_run(group: Any) -> None:
    """Add the flags that say which run is meant, and what main.py does beside training."""
    group.add_argument("--config", action="config", metavar="FILE", help="YAML file with arguments; may be repeated")
    text, number, true = str | None, int | None, bool
    flags: dict[str, tuple[Any, Any, str]] = {
        "seed": (int, 42, "seed of all random numbers [42]"),
        "matmul_precision": (
            Literal["highest", "high", "medium"],
            "highest",
            "of float32 matrices on GPUs: high and medium multiply them in TF32, which is faster [highest]",
        ),
        "ckpt_path": (
            text,
            None,
            "checkpoint: best or last (of the newest run), auto (go on with an unfinished run), or a path",
        ),
        "log_dir": (str, "logs", "folder of all runs [logs]"),
        "experiment": (text, None, "folder within log_dir; default: the net's name"),
        "run_name": (text, None, "folder of the run; default: version_0, version_1, ..."),
        "max_restarts": (int, 0, "start again so often after a process has died, from the last checkpoint [0]"),
        "patience": (number, None, "stop after so many epochs without improvement"),
        "save_every_n_steps": (number, None, "save also within epochs, as last.ckpt"),
        "ema_decay": (float | None, None, "judge averages of the weights, such as 0.999"),
        "report": (true, True, "after training, write figures and report.html into the run's folder [true]"),
        "find_lr": (true, False, "do not train, but find a learning rate [false]"),
        "find_batch_size": (true, False, "do not train, but find a fast batch size [false]"),
        "input": (
            text,
            None,
            "predict: a file such as the net was trained on, a folder of them, or an array (.npy); default: test data",
        ),
        "output": (text, None, "predict: a .csv or .npy file; export: a folder; default: in the run's folder"),
        "formats": (
            list[Literal["torch", "onnx"]] | None,
            None,
            "export: which; default: torch, and onnx if installed",
        ),
    }
    for name, (kind, default, told) in flags.items():
        group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar(kind), help=told)

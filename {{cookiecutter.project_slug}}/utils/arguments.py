"""The command line: which flags there are, and one clear line for what is wrong with them.

Names come first: a small parser finds the net and the dataset that were named, on the command line or in config
files, so that the full parser can have flags for the arguments of just these.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace

import engine
from data import DInterface
from model import MInterface
from model.model_interface import OFFERED
from utils.registry import load_class
from utils.run_folder import find_checkpoint, saved_config

COMMANDS = ("fit", "validate", "test", "predict")
# Decided by main.py, or of no use on a command line.
NO_FLAGS = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "model", "data"}
SECTIONS = {"model_name": "model", "dataset": "data"}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
PLAIN = (int, float, str, bool, type(None))


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and exit with code 2."""
        exit_with(self._one_line(message))

    def _one_line(self, message: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if unknown := re.search(
            r"unrecognized arguments: (\S+)|does not accept option '(.+?)'|^Option '(.+?)'", message
        ):
            word = next(group for group in unknown.groups() if group)
            nearest = difflib.get_close_matches("--" + word.lstrip("-").split("=")[0], flags, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help for what there is"
            return f"{word}: there is no such argument; {hint}"
        if key := re.search(r'Parser key "(.+?)"', message):
            expected = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?(Literal\[.*?\]))", message)
            value = re.search(r"(?:Given value|Got value): (.*)", message, re.DOTALL)
            if value and any(kind != "NoneType" for kind, _ in expected):
                return f"--{key[1]} {value[1].strip()}: give {_spell([a or b for a, b in expected])}"
        return " ".join(message.split())


def exit_with(message: str) -> NoReturn:
    """Print one line of error and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> tuple[str, Namespace, str]:
    """Read the command line.

    Args:
        argv: Its words, without the program's name.

    Returns:
        The command, the arguments, and the same arguments as YAML for `--config`.

    Raises:
        MisconfigurationException: A name, a file or a config does not exist or cannot be read.
        SystemExit: Anything else is wrong (code 2), or help was asked for (code 0).
    """
    command = _command(argv)
    first, rest = _first_parser().parse_known_args(argv[1:] if argv and argv[0] == command else argv)
    flags = {name: value for name, value in vars(first).items() if name != "config" and value is not None}
    given = {key: value for source in [*map(_read, first.config), flags] for key, value in source.items()}
    checkpoint = None
    saved: dict[str, Any] = {}
    if given.get("ckpt_path") is not None:
        where = {name: given.get(name) for name in ("experiment", "run_name")}
        checkpoint = find_checkpoint(str(given["ckpt_path"]), str(given.get("log_dir", "logs")), **where)
        saved = _read(config) if (config := saved_config(checkpoint)) is not None else {}
    chosen = {"model_name": "standard_net", "dataset": "standard_data"}
    for source in (saved, given):
        chosen |= {name: str(source[name]) for name in chosen if source.get(name) is not None}
    parser = _full_parser(chosen["model_name"], chosen["dataset"])
    # What was saved for another net or dataset means nothing to this one.
    foreign = {SECTIONS[name] for name in chosen if saved.get(name) != chosen[name]}
    kept = yaml.safe_dump({key: value for key, value in saved.items() if key not in foreign})
    words = [word for config in ([kept] if saved else []) + first.config for word in ("--config", config)]
    words += [f"--{name}={value}" for name, value in flags.items()]
    arguments = parser.parse_args([*words, *rest])
    arguments.ckpt_path = None if checkpoint is None else str(checkpoint)
    if command != "fit" and checkpoint is None:
        raise engine.MisconfigurationException(f"{command} needs --ckpt_path: best, last, or the path of a checkpoint")
    to_save = arguments.clone()
    for name in ("config", "ckpt_path"):
        to_save.pop(name, None)
    return command, arguments, parser.dump(to_save, skip_validation=True)


def _command(argv: Sequence[str]) -> str:
    """The first word, if it is no flag; `fit` otherwise."""
    command = argv[0] if argv and not argv[0].startswith("-") else "fit"
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise engine.MisconfigurationException(f"{command}: the commands are {', '.join(COMMANDS)}{hint}")
    return command


def constructor_arguments(cls: type[Any], arguments: Namespace) -> dict[str, Any]:
    """Those of the arguments that the constructor of `cls` takes."""
    nested = {"model", "data"}
    return {
        name: arguments[name].as_dict() if name in nested else arguments[name]
        for name in inspect.signature(cls).parameters
        if name in arguments and (name not in NO_FLAGS or name in nested)
    }


def _first_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="main.py", add_help=False, allow_abbrev=False)
    parser.error = lambda message: exit_with(message)  # type: ignore[method-assign]
    parser.add_argument("--config", action="append", default=[])
    for name in ("model_name", "dataset", "ckpt_path", "log_dir", "experiment", "run_name"):
        parser.add_argument(f"--{name}")
    return parser


def _full_parser(model_name: str, dataset: str) -> Parser:
    net, data = load_class("model", model_name), load_class("data", dataset)
    parser = Parser(
        prog="main.py",
        usage="%(prog)s [fit | validate | test | predict] [--FLAG VALUE ...]",
        description="fit (the default) trains, then tests the best checkpoint; the others need --ckpt_path.",
        allow_abbrev=False,
        print_config=None,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--config", action="config", help="YAML file with arguments; may be given repeatedly")
    run.add_argument("--seed", type=int, default=42, help="seed of all random numbers")
    run.add_argument("--ckpt_path", type=str | None, help="checkpoint: best or last (of the newest run), or a path")
    run.add_argument("--log_dir", type=str, default="logs", help="folder of all runs")
    run.add_argument("--experiment", type=str | None, help="folder within log_dir; default: the net's name")
    run.add_argument("--run_name", type=str | None, help="folder of the run; default: version_0, version_1, ...")
    run.add_argument(
        "--monitor", type=str, default="val_loss", help="logged value that decides which checkpoint is best"
    )
    run.add_argument("--monitor_mode", type=Literal["min", "max"], default="min", help="whether less or more is better")
    run.add_argument("--patience", type=int | None, help="stop after so many epochs without improvement")
    _add_constructor(parser.add_argument_group("training"), engine.Trainer, "", ())
    _add_constructor(parser.add_argument_group("model"), MInterface, "", ())
    _add_constructor(parser.add_argument_group(f"net {net.__name__}"), net, "model.", ())
    _add_constructor(parser.add_argument_group("data"), DInterface, "", ())
    _add_constructor(parser.add_argument_group(f"dataset {data.__name__}"), data, "data.", ("split",))
    parser.set_defaults({"max_epochs": 15, "log_every_n_steps": 10})
    return parser


def _read(path: str | Path) -> dict[str, Any]:
    """The content of a config file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise engine.MisconfigurationException(f"config {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise engine.MisconfigurationException(f"config {path} holds no arguments; write lines such as 'lr: 0.001'")
    for section in SECTIONS.values():
        if not isinstance(content.get(section, {}), dict):
            raise engine.MisconfigurationException(
                f"config {path}: {section} is {content[section]!r}; give its arguments by name, indented below it"
            )
    return content


def _is_plain(hint: Any) -> bool:
    """Whether a type is built of numbers, strings, booleans and containers of them: no class, no callable."""
    if get_origin(hint) is Literal or hint in PLAIN:
        return True
    inner = [part for part in get_args(hint) if part is not Ellipsis]
    return get_origin(hint) in (Union, types.UnionType, list, tuple, dict) and all(map(_is_plain, inner))


def _spell(kinds: list[str]) -> str:
    """Types as jsonargparse names them, in words."""
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    words |= {"list": "a list such as [1, 2]", "tuple": "a list such as [1, 2]", "dict": "a mapping such as {a: 1}"}
    if "float" in kinds:
        kinds = [kind for kind in kinds if kind != "int"]
    spelled = [words.get(kind, kind.removeprefix("Literal[").rstrip("]").replace("'", "")) for kind in kinds]
    return " or ".join(dict.fromkeys(spelled))


def _add_constructor(group: Any, cls: type[Any], prefix: str, skip: Iterable[str]) -> None:
    """Add a flag for each argument of a constructor that has a plain type, with help from the docstring."""
    texts = [cls.__doc__, cls.__init__.__doc__]
    described = [param for text in texts if text for param in docstring_parser.parse(text).params]
    help_texts = {param.arg_name: " ".join((param.description or "").split()) for param in described}
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):
        # A name that only type checkers import: the defaults tell the types.
        hints = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        hint = hints.get(name, type(parameter.default))
        if name in skip or (not prefix and name in NO_FLAGS) or parameter.kind not in NAMED:
            continue
        required = parameter.default is parameter.empty
        if not _is_plain(hint) or hint is type(None):
            if required:
                raise engine.MisconfigurationException(
                    f"{cls.__name__} needs {name}, which no flag can give: annotate it with int, float, str, bool, or "
                    "lists of these, or give it a default"
                )
            continue
        options: dict[str, Any] = {"type": hint, "help": help_texts.get(name, "").replace("%", "%%")}
        if prefix == "model." and name in OFFERED:
            options |= {
                "type": hint | None,
                "default": None,
                "help": options["help"] + " Default: what the dataset says.",
            }
        elif required:
            options["required"] = True
        else:
            options["default"] = parameter.default
        group.add_argument(f"--{prefix}{name}", **options)

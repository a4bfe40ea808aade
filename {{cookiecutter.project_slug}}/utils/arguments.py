"""The command line: which flags there are, and one clear line for what is wrong with them.

Names come first: a small parser finds the net and the datasets that were named, on the command line or in config
files, so that the full parser can have flags for the arguments of just these.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader

import engine
from utils.exits import exit_with
from utils.flags import NO_FLAGS, OF_COMMANDS, add_constructor, add_run, is_list, spell
from utils.processes import fitting_here, is_first, number_of
from utils.registry import OFFERED, load_class
from utils.run_folder import find_checkpoint, learned_arguments, saved_config
from utils.run_state import CONFIG, ENVIRONMENT, begun_before

Interfaces = tuple[type[Any], type[Any]]
COMMANDS = ("fit", "validate", "test", "report", "predict", "export")
# Those that one process does alone.
ALONE = ("predict", "export", "search")
SECTIONS = ("model", "data")
# What a resumed run takes from its checkpoint.
OF_THE_OPTIMIZER = ("seed", "optimizer", "optimizer_args", "lr", "lr_scales", "weight_decay")
ALIASES = {"eval_datasets": "val_datasets"}
# Arguments of one run only: a config that repeats it leaves them out.
OF_ONE_RUN = ("config", "ckpt_path", "run_name", "max_restarts", *OF_COMMANDS)
# Bounds of a config: one of a few lines can be endless by its aliases.
LARGEST, DEEPEST = 100_000, 20


class Help(argparse.HelpFormatter):
    """Help in two columns, which fits into 80 characters."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The parser adds a spelling with a plus to every list; a list is given more easily.
        return super()._format_action_invocation(action).split(f", {action.option_strings[0]}+")[0]


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and exit with code 2."""
        exit_with(self._one_line(message))

    def print_help(self, file: Any = None) -> None:
        """Print the help, in one process only."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)

    def _one_line(self, message: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if unknown := re.search(
            r"unrecognized arguments: (\S+)|does not accept option '(.+?)'|^Option '(.+?)'", message
        ):
            word = next(group for group in unknown.groups() if group)
            nearest = difflib.get_close_matches("--" + word.lstrip("-").split("=")[0], flags, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help for what there is"
            return f"{word}: there is no such argument; {hint}"
        if key := re.search(r'Parser key "(.+?)"|^argument (?:-h/)?--([\w.]+)', message):
            flag = key[1] or key[2]
            kind = next((getattr(action, "_typehint", None) for action in self._actions if action.dest == flag), None)
            given = re.search(r".*(?:Given value|Got value): (.*)", message, re.DOTALL)
            wanted = f"give {spell(kind)}" if kind is not None else "see --help"
            fault = f" {given[1].strip() or repr('')}: " if given else f": {message.partition(':')[2].strip()}; "
            return f"--{flag}{fault}{wanted}"
        return message


def parse(argv: Sequence[str], interfaces: Interfaces) -> tuple[str, Namespace]:
    """Read the command line.

    Args:
        argv: Its words, without the program's name.
        interfaces: DInterface and MInterface, whose arguments are flags.

    Returns:
        The command, or "search" for --find_lr and the like, and the arguments; `repeats` among these is the folder of
        the run whose config was given, or None.

    Raises:
        MisconfigurationException: A name, a file or a config does not exist or cannot be read.
        SystemExit: Anything else is wrong (code 2), or help was asked for (code 0).
    """
    command = _command(argv)
    first, rest = _first_parser().parse_known_args(argv[1:] if argv and argv[0] == command else argv)
    flags = {name: value for name, value in vars(first).items() if name != "config" and value is not None}
    # argparse turns `--config=--` into a list.
    first.config = list(map(str, first.config))
    configs = [_read(path) for path in first.config]
    given = {key: value for source in [*configs, flags] for key, value in source.items() if value is not None}
    automatic = given.get("ckpt_path") == "auto"
    checkpoint, saved = _resumed(given, command, interfaces)
    net, datasets = _names({**saved, **given})
    parser = _full_parser(net, datasets, interfaces)
    kept = _without_foreign(saved, net, datasets, {action.dest for action in parser._actions})
    words = [word for config in (kept, *configs) if config for word in ("--config", yaml.safe_dump(config))]
    words += [f"--{name}={_word(value)}" for name, value in flags.items()]
    words += _lists_in_one_word(rest, parser)
    arguments = _parsed(parser, words)
    arguments.ckpt_path = "auto" if automatic else None if checkpoint is None else str(checkpoint)
    folders = [Path(path).parent for path in first.config]
    arguments.repeats = next((str(folder) for folder in folders if (folder / ENVIRONMENT).is_file()), None)
    _check_command(command, arguments)
    if command == "fit" and (arguments.find_lr or arguments.find_batch_size):
        command = "search"
    called = command if command != "search" else "--find_lr" if arguments.find_lr else "--find_batch_size"
    if command in ALONE and max(number_of(arguments.devices), int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise engine.MisconfigurationException(f"{called} runs in one process: give --devices 1, and no torchrun")
    if command == "fit":
        _check_resumed(arguments, saved)
        _check_callbacks(arguments)
    elif checkpoint is None and command != "search":
        raise engine.MisconfigurationException(f"{command} needs --ckpt_path: best, last, or the path of a checkpoint")
    elif arguments.fold == "all":
        raise engine.MisconfigurationException(f"--fold all trains; {called} takes one fold: give its number")
    return command, arguments


def _resumed(given: Mapping[str, Any], command: str, interfaces: Interfaces) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that is named, and the arguments of its run that count here."""
    log_dir, wanted = str(given.get("log_dir", "logs")), given.get("ckpt_path")
    if wanted == "auto":
        # A run that is named goes on with the arguments that it has; others are found by theirs.
        folder = Path(log_dir, str(given.get("experiment") or _names(given)[0]))
        named = folder / str(given.get("run_name", "")) / CONFIG
        return None, fitting_here(_read(named), command) if os.path.isfile(named) else {}
    if wanted is None:
        return None, {}
    if command == "fit" and wanted in ("best", "last"):
        # A run that is started again goes on from what it began with, whatever is the newest meanwhile.
        wanted = begun_before(log_dir).get("ckpt_path", wanted)
    where = {name: given.get(name) for name in ("experiment", "run_name")}
    checkpoint = find_checkpoint(str(wanted), log_dir, **where)
    config = saved_config(checkpoint)
    saved = {} if config is None else fitting_here(_read(config), command)
    if config is None or command == "export" or "input" in given:
        # There may be no data to tell what the net has to look like: the checkpoint does.
        saved = {**saved, **learned_arguments(checkpoint, interfaces)}
    return checkpoint, saved


def _check_resumed(arguments: Namespace, saved: Mapping[str, Any]) -> None:
    """Refuse what a resumed run would not heed: it goes on with the optimizer and the seed that it has."""
    for name in OF_THE_OPTIMIZER:
        if name in saved and arguments[name] != saved[name]:
            raise engine.MisconfigurationException(
                f"--{name} {arguments[name]}: a run goes on with its own, {saved[name]}; start a new one from its "
                f"weights instead: --pretrained {arguments.ckpt_path}"
            )


def _check_command(command: str, arguments: Namespace) -> None:
    """Refuse flags that the command would not heed."""
    for flag, commands in OF_COMMANDS.items():
        if arguments[flag] and command not in commands:
            given = f"main.py {command} --{flag}"
            raise engine.MisconfigurationException(f"{given}: that flag is for {' and '.join(commands)}; leave it out")


def _check_callbacks(arguments: Namespace) -> None:
    """Refuse values of flags that main.py makes callbacks of."""
    watching = arguments.patience is not None or arguments.lr_schedule == "plateau"
    if watching and arguments.monitor.startswith("val_") and arguments.limit_val_batches == 0:
        raise engine.MisconfigurationException(
            "--patience and --lr_schedule plateau need validation, which --limit_val_batches 0 turns off"
        )
    for name in ("patience", "save_every_n_steps"):
        if arguments[name] is not None and arguments[name] < 1:
            raise engine.MisconfigurationException(f"--{name} {arguments[name]}; give a whole number from 1")
    if arguments.ema_decay is not None and not 0 <= arguments.ema_decay < 1:
        raise engine.MisconfigurationException(f"--ema_decay {arguments.ema_decay}; give a number from 0 to below 1")


def _parsed(parser: Parser, words: list[str]) -> Namespace:
    """The arguments, with one line of error also for what jsonargparse does not look at."""
    try:
        arguments = parser.parse_args(words)
    except (OverflowError, RecursionError) as error:
        fault = "a number is too large" if isinstance(error, OverflowError) else "nested too deep"
        raise engine.MisconfigurationException(f"{max(words, key=len)[:50]}...: {fault}") from error
    for action in parser._actions:
        # In a config, null passes as a value of any type.
        kind = getattr(action, "_typehint", None)
        if (
            action.default is not None
            and arguments.get(action.dest, action) is None
            and type(None) not in get_args(kind)
        ):
            raise engine.MisconfigurationException(f"{action.dest} is null; give {spell(kind)}")
        if dict in (kind, *get_args(kind)) and arguments.get(action.dest):
            # Values of a bare dict that come one by one, as in --optimizer_args.momentum 0.9, are still text.
            arguments[action.dest] = {k: _as_yaml(v) for k, v in arguments[action.dest].items()}
    return arguments


def _as_yaml(value: Any) -> Any:
    try:
        return get_loader("yaml")(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def to_yaml(arguments: Namespace) -> str:
    """The arguments as a config that repeats the run."""
    kept = {k: v for k, v in arguments.as_dict().items() if k not in (*OF_ONE_RUN, "repeats")}
    # By way of JSON, which knows no tuples.
    return yaml.safe_dump(json.loads(json.dumps(kept)), sort_keys=False, allow_unicode=True)


def _names(given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The net that is named, and the datasets, the one to train on first."""
    base = given.get("dataset") or given.get("train_dataset") or "standard_data"
    named = [given.get("train_dataset") or base]
    for flag in ("val_datasets", "test_datasets"):
        listed = given.get(flag) or [base]
        named += listed if isinstance(listed, list) else [listed]
    return str(given.get("model_name") or "standard_net"), list(dict.fromkeys(map(str, named)))


def _without_foreign(saved: dict[str, Any], net: str, datasets: list[str], known: set[str]) -> dict[str, Any]:
    """A saved config without arguments of another net, of datasets no longer named, and those that are not known."""
    if not saved:
        return {}
    # Lightning's Trainer and the bundled one have not quite the same.
    gone = [name for name in saved if name not in known and name not in SECTIONS]
    if gone and is_first():
        print(f"warning: there is no {', '.join(gone)} any more, which the run has had; left out", file=sys.stderr)
    kept, (old_net, old_datasets) = {name: saved[name] for name in saved if name not in gone}, _names(saved)
    if old_net != net:
        kept.pop("model", None)
    accepted = {name for dataset in datasets for name in inspect.signature(load_class("data", dataset)).parameters}
    of_data = kept.pop("data", None) or {}
    if set(old_datasets) & set(datasets):
        kept["data"] = {name: value for name, value in of_data.items() if name in accepted}
    return kept


def _lists_in_one_word(words: Sequence[str], parser: Parser) -> list[str]:
    """The words with those of a list joined: `--freeze a b` as `--freeze=["a", "b"]`, as the parser reads it."""
    hints = {flag: getattr(action, "_typehint", None) for action in parser._actions for flag in action.option_strings}
    lists = {flag for flag, hint in hints.items() if is_list(hint)}
    joined: list[str] = []
    words = list(words)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if hints.get(flag) is bool and not equals and (not words or words[0].startswith("--")):
            # A switch without a value is on.
            equals, value = "=", "true"
        items = [value] if equals else []
        while flag in lists and not equals and words and not words[0].startswith("--"):
            items.append(words.pop(0))
        single = flag not in lists or not is_list(hints[flag], only=True)
        if len(items) == 1 and (single or items[0].startswith("[") or items[0] == "null"):
            joined.append(f"{flag}={items[0]}")
        else:
            joined.append(f"{flag}={_word(items)}" if items else flag)
    return joined


def _word(value: Any) -> str:
    """A value as the parser reads it; items of a list that are numbers stay numbers."""
    if not isinstance(value, list):
        return str(value)
    numbers = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
    return "[" + ", ".join(item if numbers.fullmatch(item) else json.dumps(item) for item in map(str, value)) + "]"


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
    for name in ("model_name", "dataset", "train_dataset", "ckpt_path", "log_dir", "experiment", "run_name", "input"):
        parser.add_argument(f"--{name}")
    for name in ("val_datasets", "test_datasets"):
        aliases = [f"--{alias}" for alias, meant in ALIASES.items() if meant == name]
        parser.add_argument(f"--{name}", *aliases, nargs="+")
    return parser


def _full_parser(model_name: str, datasets: list[str], interfaces: Interfaces) -> Parser:
    data_interface, model_interface = interfaces
    net = load_class("model", model_name)
    parser = Parser(
        prog="main.py",
        usage="%(prog)s [COMMAND] [--FLAG VALUE ...]",
        description=f"COMMAND is one of {', '.join(COMMANDS)}. fit, the default, trains and then tests the best "
        "checkpoint; the others need --ckpt_path.",
        allow_abbrev=False,
        print_config=None,
        formatter_class=Help,
    )
    add_run(parser.add_argument_group("run"))
    add_constructor(parser.add_argument_group("training"), engine.Trainer, "")
    add_constructor(parser.add_argument_group("model"), model_interface, "")
    told = dict.fromkeys(OFFERED, "what the dataset says")
    add_constructor(parser.add_argument_group(f"net {net.__name__}"), net, "model.", later=told)
    add_constructor(parser.add_argument_group("data"), data_interface, "")
    takes = {name: set(inspect.signature(load_class("data", name)).parameters) for name in datasets}
    shared = {a for name, own in takes.items() for a in own if any(a in takes[n] for n in takes if n != name)}
    known = {"split"}
    for name in datasets:
        data = load_class("data", name)
        group = parser.add_argument_group(f"dataset {data.__name__}")
        add_constructor(group, data, "data.", known, dict.fromkeys(shared, "each dataset's own"))
        known |= takes[name]
    return parser


def _read(path: str | Path) -> dict[str, Any]:
    """The content of a config file."""
    try:
        content = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise engine.MisconfigurationException(f"config {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise engine.MisconfigurationException(f"config {path} holds no arguments; write lines such as 'lr: 0.001'")
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise engine.MisconfigurationException(
                f"config {path}: {section} is {content[section]!r}; give its arguments by name, indented below it"
            )
    if sum(1 for _ in islice(_parts(content, str(path)), LARGEST)) == LARGEST:
        raise engine.MisconfigurationException(f"config {path} holds {LARGEST} values or more; see its aliases (*name)")
    if "config" in content:
        raise engine.MisconfigurationException(f"config {path} names a config; give both: --config A --config {path}")
    return {ALIASES.get(str(key), str(key)): value for key, value in content.items()}


def _parts(value: Any, path: str, depth: int = 0) -> Iterator[Any]:
    """A value and all that it holds."""
    if depth > DEEPEST:
        raise engine.MisconfigurationException(f"config {path}: lists or mappings lie more than {DEEPEST} deep")
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(part, path, depth + 1)

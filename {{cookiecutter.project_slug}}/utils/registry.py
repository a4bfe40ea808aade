"""Names to classes: `my_net` stands for class `MyNet` in `model/my_net.py`, `my_data` for `MyData` in `data/`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from torch import nn
from torch.utils.data import Dataset

from engine import MisconfigurationException

T = TypeVar("T")
Folder = Literal["model", "data"]
WHAT = {"model": "net", "data": "dataset"}
BASE: dict[str, type[Any]] = {"model": nn.Module, "data": Dataset}
FLAG = {"model": "--model_name", "data": "--dataset"}
ALL_SPLITS = ("train", "val", "test", "predict")
# Net arguments that the dataset fills in unless they are given.
OFFERED = ("num_classes", "sample_shape")
# Names that a message lists; libraries have many.
MOST_SHOWN = 30


def names(folder: Folder) -> list[str]:
    """The names that `load_class` knows: every file directly in the folder, but the interface."""
    files = sorted(_path(folder).glob("*.py"))
    return [
        f.stem for f in files if f.stem.isidentifier() and not f.stem.startswith("_") and "_interface" not in f.stem
    ]


def load_class(folder: Folder, name: str) -> type[Any]:
    """The class that `name` stands for.

    Args:
        folder: Where to look: "model" or "data".
        name: File name without `.py`. The class has the same name in CamelCase; its upper and lower case is free.

    Raises:
        MisconfigurationException: There is no such file, it cannot be imported, or it lacks the class.
    """
    known = names(folder)
    if not isinstance(name, str):
        raise MisconfigurationException(f"{FLAG[folder]} {name!r:.50}: give a name; there are: {', '.join(known)}")
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise MisconfigurationException(
            f"{FLAG[folder]} {' '.join(name.split())[:200]}: there is no {WHAT[folder]} of that name; {hint}"
            f"there are: {', '.join(known)} (files in {folder}/)"
        )
    file = f"{folder}/{name}.py"
    try:
        module = importlib.import_module(f"{folder}.{name}")
    except (Exception, SystemExit) as error:
        raise MisconfigurationException(f"{file} cannot be imported: {describe(error, folder)}") from error
    wanted = name.replace("_", "").lower()
    for attribute, value in vars(module).items():
        if attribute.lower() == wanted and isinstance(value, type):
            if not issubclass(value, BASE[folder]):
                raise MisconfigurationException(f"{file}: class {attribute} is no torch {BASE[folder].__name__}")
            return value
    raise MisconfigurationException(
        f"{file} has no class {camel_case(name)}; the {WHAT[folder]} of that file is named so"
    )


def build(folder: Folder, name: str, arguments: dict[str, Any]) -> Any:
    """An instance of the class that `name` stands for.

    Raises:
        MisconfigurationException: The class cannot be found, or its constructor fails.
    """
    cls = load_class(folder, name)
    try:
        return cls(**arguments)
    except Exception as error:
        raise MisconfigurationException(f"{WHAT[folder]} {name}: {describe(error, folder)}") from error


def build_dataset(name: str, split: str, arguments: dict[str, Any]) -> Any:
    """A split of the dataset of that name, with those of the arguments that it takes."""
    dataset = build("data", name, {**{k: v for k, v in arguments.items() if accepts(name, k)}, "split": split})
    reads = (
        method for base in type(dataset).__mro__ for method in ("__getitems__", "__getitem__") if method in vars(base)
    )
    if next(reads) == "__getitem__" and hasattr(dataset, "__getitems__"):
        # A class that derives from one that makes batches, and reads samples in its own way: batches would pass it by.
        dataset.__getitems__ = None
    return dataset


def accepts(name: str, argument: str) -> bool:
    """Whether a dataset takes an argument of that name."""
    parameters = inspect.signature(load_class("data", name)).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def own_splits(name: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    """The splits that a dataset has of its own: its attribute `splits`, or all."""
    cls = load_class("data", name)
    declared = any("splits" in inspect.get_annotations(base) for base in cls.__mro__)
    if declared and not hasattr(cls, "splits"):
        # It depends on the files.
        return tuple(build_dataset(name, "train", arguments).splits)
    return tuple(getattr(cls, "splits", ALL_SPLITS))


def build_net(name: str, arguments: dict[str, Any], task: str, tell: Callable[[str], Any]) -> nn.Module:
    """The net of that name; what the dataset tells is added to `arguments`, where they lack it.

    Args:
        name: Name of the net.
        arguments: Its arguments; the ones in `OFFERED` may be missing.
        task: What is learned; it decides what `num_classes` means: the number of outputs.
        tell: Gives attributes of the dataset by name, None for one that it lacks.

    Raises:
        MisconfigurationException: The net needs something that neither the arguments nor the dataset say, or its
            constructor fails.
    """
    outputs = {"binary": 1, "regression": tell("num_targets") or 1, "multilabel": tell("num_targets")}
    offers = {"num_classes": outputs.get(task) or tell("num_classes"), "sample_shape": tell("sample_shape")}
    accepted = inspect.signature(load_class("model", name)).parameters
    for argument, offered in offers.items():
        if argument not in arguments and offered is not None:
            arguments[argument] = tuple(offered) if argument == "sample_shape" else offered
        required = argument in accepted and accepted[argument].default is inspect.Parameter.empty
        if required and argument not in arguments:
            raise MisconfigurationException(
                f"net {name} needs {argument}, and the dataset does not tell: give its class an attribute of that "
                f"name, or --model.{argument}"
            )
    count = arguments.get("num_classes")
    if isinstance(count, int) and count < 1:
        raise MisconfigurationException(f"--model.num_classes {count}: give a whole number from 1")
    unwanted = [argument for argument in OFFERED if argument not in accepted]
    net: nn.Module = build("model", name, {k: v for k, v in arguments.items() if k not in unwanted})
    return net


def camel_case(name: str) -> str:
    """`my_net` as `MyNet`."""
    return re.sub(r"(?:^|_)([a-z0-9])", lambda match: match[1].upper(), name)


def snake_case(name: str) -> str:
    """`MSELoss` as `mse_loss`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def from_library(
    module: ModuleType, base: type[Any], name: str, arguments: Mapping[str, Any], flag: str, **given: Any
) -> Any:
    """An instance of a library's class, such as `torch.optim.AdamW`, by the name of the class alone.

    Args:
        module: Where to look.
        base: What the class must derive from.
        name: Name of the class.
        arguments: Arguments that the user chose.
        flag: The flag that took the name, for messages.
        **given: Arguments that the caller decides; the user cannot set them.

    Raises:
        MisconfigurationException: The module has no public class of that kind and name, or it refuses the arguments.
    """
    return construct(pick(name, classes(module, base), flag), arguments, f"{flag} {name}", **given)


def classes(module: ModuleType, base: type[Any]) -> dict[str, type[Any]]:
    """The public classes in a module that derive from `base`, by name; `base` itself is none of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not name.startswith("_")
    }


def pick(name: str, known: Mapping[str, T], flag: str) -> T:
    """What stands under a name.

    Raises:
        MisconfigurationException: Nothing does; the message says what there is, and what is nearest.
    """
    if not isinstance(name, str):
        raise MisconfigurationException(f"{flag} {name!r:.50}: give a name, such as {next(iter(known))}")
    if name in known:
        return known[name]
    plain = {other.replace("_", "").lower(): other for other in known}
    nearest = difflib.get_close_matches(name.replace("_", "").lower(), plain, 1)
    hint = f"did you mean {plain[nearest[0]]}? " if nearest else ""
    shown = ", ".join(list(known)[:MOST_SHOWN]) + (", ..." if len(known) > MOST_SHOWN else "")
    raise MisconfigurationException(f"{flag} {name}: there is none of that name; {hint}there are: {shown}")


def construct(make: Callable[..., T], arguments: Mapping[str, Any], what: str, **given: Any) -> T:
    """Call `make` with the arguments that the user chose, and those that are given.

    Raises:
        MisconfigurationException: It fails; the message begins with `what` and names the arguments there are.
    """
    try:
        inspect.signature(make).bind(**given, **arguments)  # says what is missing without the name of a function
        return make(**given, **arguments)
    except Exception as error:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(make).parameters.values()
        free = ", ".join(p.name for p in parameters if p.kind in named and p.name not in given)
        reason = " ".join(str(error).split())
        raise MisconfigurationException(f"{what}: {reason}; its arguments are: {free or 'none'}") from error


def describe(error: BaseException, folder: Folder) -> str:
    """An error of a user's file in one line, with the place where it was raised."""
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    raised = [frame for frame in frames if Path(frame.filename).parent == _path(folder)] or list(frames)
    # A syntax error names its own line, in a file that never ran.
    where = "" if isinstance(error, SyntaxError) else f" ({Path(raised[-1].filename).name}:{raised[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _path(folder: Folder) -> Path:
    spec = find_spec(folder)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent

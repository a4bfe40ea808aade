"""Names to classes: `my_net` stands for class `MyNet` in `model/my_net.py`, `my_data` for `MyData` in `data/`."""

from __future__ import annotations

import difflib
import importlib
import re
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from engine import MisconfigurationException

Folder = Literal["model", "data"]
WHAT = {"model": "net", "data": "dataset"}
BASE: dict[str, type[Any]] = {"model": nn.Module, "data": Dataset}
FLAG = {"model": "--model_name", "data": "--dataset"}


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
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise MisconfigurationException(
            f"{FLAG[folder]} {name}: there is no {WHAT[folder]} of that name; {hint}"
            f"there are: {', '.join(known)} (files in {folder}/)"
        )
    file = f"{folder}/{name}.py"
    try:
        module = importlib.import_module(f"{folder}.{name}")
    except (Exception, SystemExit) as error:
        raise MisconfigurationException(f"{file} cannot be imported: {_describe(error, folder)}") from error
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
        raise MisconfigurationException(f"{WHAT[folder]} {name}: {_describe(error, folder)}") from error


def camel_case(name: str) -> str:
    """`my_net` as `MyNet`."""
    return re.sub(r"(?:^|_)([a-z0-9])", lambda match: match[1].upper(), name)


def _describe(error: BaseException, folder: Folder) -> str:
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

"""Loggers: where metrics and hyper-parameters go.

TensorBoard and CSV write to `save_dir/name/version`; give both the same three and they share a folder. Any other object
with the methods of `Logger` will do, those of Lightning included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from engine.exceptions import MisconfigurationException
from engine.loggers.csv_logs import CSVLogger
from engine.loggers.logger import (
    DummyLogger,
    FolderLogger,
    Logger,
    checkpoint_folder_of,
    log_hyperparams,
    make_folder,
    rank_zero_experiment,
    run_folder_of,
)
from engine.loggers.tensorboard import TensorBoardLogger

# Its name until Lightning 1.8.
LightningLoggerBase = Logger

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "FolderLogger",
    "LightningLoggerBase",
    "Logger",
    "TensorBoardLogger",
    "as_loggers",
    "checkpoint_folder_of",
    "log_hyperparams",
    "make_folder",
    "rank_zero_experiment",
    "run_folder_of",
]

# What the Trainer calls, and what it reads: the latter is not read here, since a logger may start a run to tell.
METHODS = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
ATTRIBUTES = ("name", "version", "save_dir")
_NOTHING = object()


def as_loggers(logger: Any, root: str) -> list[Any]:
    """The loggers that the `logger` argument of the Trainer stands for.

    Args:
        logger: A logger, several, True for TensorBoard (CSV where that is not installed), False or None for none.
        root: Folder of all experiments, for True.

    Raises:
        MisconfigurationException: One of them is no logger; the message says which methods it lacks.
    """
    if logger is None or isinstance(logger, bool):
        return [(TensorBoardLogger if find_spec("tensorboard") else CSVLogger)(root)] if logger else []
    several = isinstance(logger, Iterable) and not isinstance(logger, str) and not hasattr(logger, "log_metrics")
    loggers = list(logger) if several else [logger]
    for one in loggers:
        missing = [name for name in METHODS if not callable(getattr(one, name, None))]
        missing += [name for name in ATTRIBUTES if inspect.getattr_static(one, name, _NOTHING) is _NOTHING]
        if missing or isinstance(one, type):
            lacks = f"has no {', '.join(missing)}" if missing else "is a class"
            raise MisconfigurationException(
                f"logger={one!r:.100} {lacks}; give an object of a subclass of engine.loggers.Logger, or False for none"
            )
    return loggers

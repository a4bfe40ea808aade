"""Logger: the base of all loggers, and of those that write into a folder for each run."""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from engine.distributed import is_rank_zero
from engine.exceptions import MisconfigurationException
from engine.hparams import save_hparams_to_yaml

if TYPE_CHECKING:
    from engine.trainer import Trainer

T = TypeVar("T")


class Logger(ABC):
    """Base of all loggers: write at least `name`, `version`, `log_metrics` and `log_hyperparams`.

    Methods are called in every process; `engine.utilities.rank_zero_only` keeps one to the first. Those without
    `abstractmethod` may be left as they are.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Name or number of the run."""

    @property
    def save_dir(self) -> str | None:
        """Folder of all experiments; None if nothing is written here."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Folder of the experiment."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Folder of the run."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between the parts of a name that belongs to a group."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record numbers at an optimizer step."""

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record the arguments of a run."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:  # noqa: B027
        """Record the model's operations."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:  # noqa: B027
        """A ModelCheckpoint has written a file."""

    def save(self) -> None:  # noqa: B027
        """Bring everything to disk."""

    def finalize(self, status: str) -> None:
        """A run ended with "success" or "failed"; logging may go on afterwards."""
        self.save()

    def state_dict(self) -> dict[str, Any]:
        """How far the files have come, after `save`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Go on from there: what was logged later no longer counts. An empty state takes back everything."""


class DummyExperiment:
    """Does nothing, whatever it is asked to."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __getitem__(self, index: int) -> DummyExperiment:
        return self

    def __setitem__(self, index: int, value: Any) -> None: ...


class DummyLogger(Logger):
    """Records nothing, so that code which uses a logger runs without one."""

    name = version = ""

    @property
    def experiment(self) -> DummyExperiment:
        """One that does nothing, either."""
        return DummyExperiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __getitem__(self, index: int) -> DummyLogger:
        return self


def rank_zero_experiment(experiment: Callable[[Any], T]) -> Callable[[Any], T | DummyExperiment]:
    """Decorator of a logger's `experiment`: all processes but the first get one that does nothing."""

    @functools.wraps(experiment)
    def on_rank_zero(self: Any) -> T | DummyExperiment:
        return experiment(self) if is_rank_zero() else DummyExperiment()

    return on_rank_zero


class FolderLogger(Logger):
    """Base of loggers that write into `save_dir/name/version`; only rank 0 writes.

    Args:
        save_dir: Folder of all experiments.
        name: Name of the experiment; an empty one stands for no folder of its own.
        version: Name of the run; a number n stands for version_n, None for the next free number.
        prefix: Text in front of all names of metrics, with a dash.
    """

    name: str = ""
    save_dir: str = ""

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        self.save_dir, self.name = os.fspath(save_dir), name or ""
        self.hparams: dict[str, Any] = {}
        self._version, self._prefix = version, f"{prefix}-" if prefix else ""

    @property
    def version(self) -> int | str:
        """Name or number of the run; the folder of a new number is made at once, so that nobody else takes it."""
        if self._version is None:
            self._version = _claim_version(Path(self.root_dir)) if is_rank_zero() else 0
        return self._version

    @property
    def root_dir(self) -> str:
        """Folder of the experiment."""
        return str(Path(self.save_dir, self.name))

    @property
    def log_dir(self) -> str:
        """Folder of the run."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return str(Path(self.root_dir, version))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write them to `hparams.yaml`, with those of before."""
        if is_rank_zero():
            self.hparams |= vars(params) if isinstance(params, Namespace) else params
            make_folder(Path(self.log_dir))
            save_hparams_to_yaml(Path(self.log_dir, "hparams.yaml"), self.hparams)

    def _prefixed(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._prefix}{name}": value for name, value in metrics.items()}


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make a folder and those above it.

    Raises:
        MisconfigurationException: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise MisconfigurationException(
            f"the folder {folder} cannot be made ({error.strerror}); choose another folder for logs and checkpoints"
        ) from error


def _claim_version(folder: Path) -> int:
    make_folder(folder)
    taken = [int(m[1]) for m in (re.fullmatch(r"version_(\d+)", p.name) for p in folder.iterdir()) if m]
    number = max(taken, default=-1) + 1
    while True:
        path = Path(folder, f"version_{number}")
        if not path.exists():
            with suppress(FileExistsError):
                make_folder(path, exist_ok=False)
                return number
        number += 1


def run_folder_of(loggers: Sequence[Any], default: str) -> str | None:
    """Folder of a run: that of the first logger, or where it saves; None if it says nothing, `default` without any."""
    if not loggers:
        return default
    folder: str | None = getattr(loggers[0], "log_dir", None) or loggers[0].save_dir
    return folder


def checkpoint_folder_of(loggers: Sequence[Any], default: str) -> Path:
    """Folder for the checkpoints of a run: that of the first logger's version, else `default`."""
    if not loggers:
        return Path(default, "checkpoints")
    first = loggers[0]
    if first.version is None:
        # Some have a version only once their run has begun.
        getattr(first, "experiment", None)
    version = first.version
    run = version if isinstance(version, str) else f"version_{version}"
    return Path(first.save_dir or default, first.name or "", run, "checkpoints")


def log_hyperparams(t: Trainer) -> None:
    """Hand the arguments of model and data, and the model's graph, to the loggers.

    Raises:
        MisconfigurationException: Model and data have arguments of the same name with different values.
    """
    owners = [owner for owner in (t.module, t.datamodule) if owner is not None and owner._log_hyperparams]
    hparams: dict[str, Any] = {}
    for owner in owners:
        initial = owner.hparams_initial
        differ = [name for name in initial if name in hparams and not _same(initial[name], hparams[name])]
        if differ:
            raise MisconfigurationException(
                f"hyper-parameters {', '.join(differ)} of model and data have different values; rename one, or keep it "
                "from the loggers with save_hyperparameters(logger=False)"
            )
        hparams |= initial
    for logger in t.loggers:
        if owners:
            logger.log_hyperparams(hparams)
        if hasattr(logger, "log_graph"):
            logger.log_graph(t.module)
        logger.save()


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(torch.equal(a, b) if isinstance(a, Tensor) else a == b)

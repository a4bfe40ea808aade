"""Loggers: where metrics and hyper-parameters go.

Both write to `save_dir/name/version`; give them the same three and they share a folder. Only rank 0 writes.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.distributed import is_rank_zero
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from engine.trainer import Trainer


class Logger:
    """Base of all loggers.

    Args:
        save_dir: Folder of all experiments.
        name: Name of the experiment.
        version: Name of the run; a number n stands for version_n, None for the next free number.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str = "lightning_logs", version: int | str | None = None
    ) -> None:
        self.save_dir = str(save_dir)
        self.name = name
        self._version = version

    @property
    def version(self) -> int | str:
        """Name or number of the run; the folder of a new number is made at once, so that nobody else takes it."""
        if self._version is None:
            self._version = _claim_version(Path(self.save_dir, self.name)) if is_rank_zero() else 0
        return self._version

    @property
    def log_dir(self) -> str:
        """Folder of the run."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return str(Path(self.save_dir, self.name, version))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers at an optimizer step."""
        raise NotImplementedError

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Record the arguments of a run."""

    def state_dict(self) -> dict[str, Any]:
        """How far the files have come, after `save`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: what was logged later no longer counts. An empty state takes back everything."""

    def save(self) -> None:
        """Bring everything to disk."""

    def finalize(self, status: str) -> None:
        """A run ended with "success" or "failed"; logging may go on afterwards."""
        self.save()


class TensorBoardLogger(Logger):
    """Scalars for `tensorboard --logdir SAVE_DIR`."""

    _writer: SummaryWriter | None = None

    @property
    def experiment(self) -> SummaryWriter:
        """The SummaryWriter, for figures, images and the like; use it on rank 0."""
        if self._writer is None:
            # Imported when it is needed: `--help` and runs without this logger need not wait for it.
            from torch.utils.tensorboard import SummaryWriter

            make_folder(Path(self.log_dir))
            self._writer = SummaryWriter(self.log_dir)
        return self._writer

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write one scalar for each number."""
        if is_rank_zero():
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Write the hyper-parameters for TensorBoard's HPARAMS page."""
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in params.items()}
        if is_rank_zero() and flat:
            from torch.utils.tensorboard.summary import hparams as hparams_summary

            file_writer = self.experiment._get_file_writer()  # type: ignore[no-untyped-call]
            for summary in hparams_summary(flat, {}):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        """Bytes of each event file."""
        return {file.name: file.stat().st_size for file in self._files()} if is_rank_zero() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut the event files of this folder to the bytes they had, and remove those that came later.

        Another run's folder, and files that no SummaryWriter has named, are left alone.
        """
        self.finalize("resumed")
        files = self._files() if is_rank_zero() else []
        if not state_dict.keys() <= {file.name for file in files}:
            return
        for file in files:
            if file.name not in state_dict:
                if re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+", file.name):
                    file.unlink()
            elif file.stat().st_size > int(state_dict[file.name]) >= 0:
                os.truncate(file, int(state_dict[file.name]))

    def save(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.flush()

    def _files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))

    def finalize(self, status: str) -> None:
        """Close the file; logging again would open another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class CSVLogger(Logger):
    """One row per call in `metrics.csv`; columns are added as new names appear."""

    _file: TextIO | None = None
    _columns: list[str]
    _rows = 0
    _newest: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Append a row."""
        if not is_rank_zero():
            return
        row = {"step": step, **metrics}
        if self._file is None:
            self._open()
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite([*self._columns, *new])
        csv.DictWriter(self._require_file(), self._columns, lineterminator="\n").writerow(row)
        self._rows += 1
        self._newest = row

    def state_dict(self) -> dict[str, Any]:
        """Number of rows, and the newest of them."""
        return {"rows": self._rows, "newest": {name: str(self._newest[name]) for name in sorted(self._newest)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep so many rows, unless the file is another run's."""
        if is_rank_zero() and self._path.exists():
            self.finalize("resumed")
            keep = int(state_dict.get("rows", 0))
            rows, _ = _read_rows(self._path)
            row = rows[keep - 1] if 0 < keep <= len(rows) else {}
            if all(row.get(name) == value for name, value in state_dict.get("newest", {}).items()):
                self._open(keep=keep)

    def save(self) -> None:
        """Bring everything to disk.

        Raises:
            FileNotFoundError: The file was removed.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            # Writing to a file that was removed succeeds, and is lost.
            self._path.stat()

    def finalize(self, status: str) -> None:
        """Close the file; logging again continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return Path(self.log_dir, "metrics.csv")

    def _open(self, keep: int | None = None) -> None:
        make_folder(Path(self.log_dir))
        rows, self._columns = _read_rows(self._path)
        self._write_all(rows[:keep])

    def _rewrite(self, columns: list[str]) -> None:
        self._require_file().close()
        rows, _ = _read_rows(self._path)
        self._columns = columns
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        self._rows, self._newest = len(rows), {name: value for name, value in rows[-1].items() if value} if rows else {}
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", newline="")  # noqa: SIM115  # stays open until finalize

    def _require_file(self) -> TextIO:
        assert self._file is not None
        return self._file


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


def _read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    if not path.exists():
        return [], ["step"]
    with open(path, newline="") as file:
        text = file.read()
    # A killed run may have left half a row behind.
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return list(reader), list(reader.fieldnames or ["step"])


def as_loggers(logger: Logger | Sequence[Logger] | bool, root: str) -> list[Logger]:
    """The loggers that the `logger` argument of the Trainer stands for."""
    if isinstance(logger, bool):
        return [TensorBoardLogger(root)] if logger else []
    return list(logger) if isinstance(logger, Sequence) else [logger]


def log_hyperparams(t: Trainer) -> None:
    """Hand the arguments of model and data to the loggers."""
    hparams = {**(t.datamodule.hparams if t.datamodule is not None else {}), **t.module.hparams}
    for logger in t.loggers:
        logger.log_hyperparams(hparams)

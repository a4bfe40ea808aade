"""Loggers: where metrics and hyper-parameters go.

Both write to `save_dir/name/version`; give them the same three and they share a folder. Only rank 0 writes.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
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
        self._start_step: int | None = None

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

    def resume_at(self, step: int) -> None:
        """The run continues at `step`: what an earlier process logged at or after it no longer counts."""
        self._start_step = step

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
            self._writer = SummaryWriter(self.log_dir, purge_step=self._start_step)
            self._start_step = None
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

    def save(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Close the file; logging again would open another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class CSVLogger(Logger):
    """One row per call in `metrics.csv`; columns are added as new names appear."""

    _file: TextIO | None = None
    _columns: list[str]

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

    def save(self) -> None:
        """Bring everything to disk."""
        if self._file is not None:
            self._file.flush()

    def finalize(self, status: str) -> None:
        """Close the file; logging again continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return Path(self.log_dir, "metrics.csv")

    def _open(self) -> None:
        make_folder(Path(self.log_dir))
        rows, self._columns = _read_rows(self._path)
        if self._start_step is not None:
            rows = [row for row in rows if float(row["step"]) < self._start_step]
            self._start_step = None
        self._write_all(rows)

    def _rewrite(self, columns: list[str]) -> None:
        self._require_file().close()
        rows, _ = _read_rows(self._path)
        self._columns = columns
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", newline="")  # noqa: SIM115  # stays open until finalize

    def _require_file(self) -> TextIO:
        assert self._file is not None
        return self._file


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        MisconfigurationException: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationException(
            f"the folder {folder} cannot be made ({error.strerror}); choose another folder for logs"
        ) from error


def _claim_version(folder: Path) -> int:
    make_folder(folder)
    taken = [int(m[1]) for m in (re.fullmatch(r"version_(\d+)", p.name) for p in folder.iterdir()) if m]
    number = max(taken, default=-1) + 1
    while True:
        try:
            Path(folder, f"version_{number}").mkdir()
            return number
        except FileExistsError:
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

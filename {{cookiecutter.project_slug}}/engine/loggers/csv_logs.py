"""CSVLogger."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, TextIO

from engine.distributed import is_rank_zero
from engine.loggers.logger import DummyExperiment, FolderLogger, make_folder


class CSVLogger(FolderLogger):
    """One row per call in `save_dir/name/version/metrics.csv`; columns are added as new names appear.

    Args:
        save_dir: Folder of all experiments.
        name: Name of the experiment; an empty one stands for no folder of its own.
        version: Name of the run; a number n stands for version_n, None for the next free number.
        prefix: Text in front of all names of metrics, with a dash.
        flush_logs_every_n_steps: How often rows are written out at least, so that others can read them.
    """

    _file: TextIO | None = None
    _columns: list[str]
    _rows = 0
    _newest: dict[str, Any] = {}

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_every = flush_logs_every_n_steps

    @property
    def experiment(self) -> Any:
        """What writes the file: the logger itself; on other ranks than 0 one that does nothing."""
        return self if is_rank_zero() else DummyExperiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; its step is the number of rows by default."""
        if not is_rank_zero():
            return
        if self._file is None:
            self._open()
        step = self._rows if step is None else step
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        row = {"step": step, **self._prefixed(numbers)}
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite([*self._columns, *new])
        csv.DictWriter(self._require_file(), self._columns, lineterminator="\n").writerow(row)
        self._rows += 1
        self._newest = row
        if (step + 1) % self._flush_every == 0:
            self._require_file().flush()

    def state_dict(self) -> dict[str, Any]:
        """Number of rows, and the newest of them; they then survive a power cut, too."""
        if self._file is not None:
            os.fsync(self._file.fileno())
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


def _read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    if not path.exists():
        return [], ["step"]
    with open(path, newline="") as file:
        text = file.read()
    # A killed run may have left half a row behind.
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return list(reader), list(reader.fieldnames or ["step"])

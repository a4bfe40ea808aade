"""CSV files, read and checked."""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MISSING = ("", "?", "-", "na", "n/a", "nan", "null", "none")


class Table:
    """The cells of a CSV file as text, column by column, with one line of error for what is wrong with them."""

    def __init__(self, file: Path, delimiter: str | None) -> None:
        self.file = file
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{file}, line {line}: this is not UTF-8; save the table as CSV in UTF-8") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}; give another file") from error
        first = text.partition("\n")[0]
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter or max(",;\t", key=first.count),
            skipinitialspace=True,
            strict=True,
        )
        try:
            # Spreadsheets leave rows of empty cells.
            rows = [(reader.line_num, row) for row in reader if any(row)]
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}; mend its quotes") from error
        if len(rows) < 2:
            raise ValueError(f"{file} is empty; it needs a line of column names and a line for each sample")
        header = [name.strip() for name in rows.pop(0)[1]]
        self._check_header(header)
        for line, row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"{file}, line {line}: there are {len(row)} cells for {len(header)} columns; add or remove cells, "
                    "and put quotes around a cell that holds a delimiter"
                )
        self.lines = [line for line, _ in rows]
        self.columns = dict(zip(header, zip(*(row for _, row in rows), strict=True), strict=True))

    def _check_header(self, header: list[str]) -> None:
        if "" in header:
            raise ValueError(f"{self.file}: column {header.index('') + 1} has no name; name it, or remove it")
        repeated = [name for name, count in Counter(header).items() if count > 1]
        if repeated or any("." in name and _number(name) == _number(name) for name in header):
            what = f"names {repeated[0]} twice" if repeated else "holds numbers"
            raise ValueError(f"{self.file}: the first line {what}; it must name each column once")

    def check_uses(self, names: Sequence[str]) -> None:
        """Check that columns exist, and that none is used twice."""
        for name in names:
            if name not in self.columns:
                nearest = difflib.get_close_matches(name, self.columns, 1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise ValueError(f"{self.file} has no column {name}; {hint}it has {', '.join(self.columns)}")
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"column {name} is used twice; use it as target, feature, image, group or split only")

    def place(self, row: int, column: str) -> str:
        """Where a cell is, in words."""
        return f"{self.file}, line {self.lines[row]}, column {column}"

    def text(self, name: str, rows: Sequence[int] | None = None) -> list[str]:
        """Cells of a column, none of which may be empty."""
        rows = range(len(self.lines)) if rows is None else rows
        cells = [self.columns[name][row].strip() for row in rows]
        if "" in cells:
            raise ValueError(
                f"{self.place(rows[cells.index('')], name)}: the cell is empty; fill it, or remove the row"
            )
        return cells

    def is_numeric(self, names: Sequence[str], rows: Sequence[int]) -> bool:
        """Whether columns hold numbers, leaving aside missing values."""
        cells = {self.columns[name][row].strip().lower() for name in names for row in rows} - set(MISSING)
        return bool(cells) and not any(np.isnan(_number(cell)) for cell in cells)

    def numbers(self, names: Sequence[str], rows: Sequence[int] | None = None) -> np.ndarray:
        """Cells of columns, of shape (rows, columns); float64, but all of them finite as float32."""
        rows = range(len(self.lines)) if rows is None else rows
        values = np.empty((len(rows), len(names)))
        for position, name in enumerate(names):
            column = self.columns[name]
            values[:, position] = np.fromiter((_number(column[row]) for row in rows), float, len(rows))
            wrong = ~(np.abs(values[:, position]) <= np.finfo(np.float32).max)
            if wrong.any():
                row = rows[int(wrong.argmax())]
                cell = column[row].strip()
                what = "the value is missing" if cell.lower() in MISSING else f"{cell} is no number"
                raise ValueError(f"{self.place(row, name)}: {what}; mend it, or name features, target or image_column")
        return values


def _number(cell: str) -> float:
    """A cell as a number; nan if it is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")

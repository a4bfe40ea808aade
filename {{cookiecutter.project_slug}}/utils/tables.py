"""CSV files, read and checked."""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from engine import MisconfigurationException

DELIMITERS = ",;\t"
# Larger numbers are infinite as float32.
LARGEST = float(np.finfo(np.float32).max)
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
            delimiter=delimiter or max(DELIMITERS, key=first.count),
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
        if repeated or any("." in name and to_number(name) == to_number(name) for name in header):
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
        return bool(cells) and not any(np.isnan(to_number(cell)) for cell in cells)

    def numbers(self, names: Sequence[str], rows: Sequence[int] | None = None) -> np.ndarray:
        """Cells of columns, of shape (rows, columns); float64, but all of them finite as float32."""
        rows = range(len(self.lines)) if rows is None else rows
        values = np.empty((len(rows), len(names)))
        for position, name in enumerate(names):
            column = self.columns[name]
            values[:, position] = np.fromiter((to_number(column[row]) for row in rows), float, len(rows))
            wrong = ~(np.abs(values[:, position]) <= LARGEST)
            if wrong.any():
                row = rows[int(wrong.argmax())]
                what = no_number(column[row])
                raise ValueError(f"{self.place(row, name)}: {what}; mend it, or name features, target or image_column")
        return values


def read_rows(file: Path, delimiter: str | None = None) -> Iterator[tuple[int, list[str] | str]]:
    """The rows of a CSV file one by one, that of the column names first, without holding more than one.

    Args:
        file: The file, in UTF-8; what is not comes as lone surrogates.
        delimiter: As in `Table`, where the first line has it.

    Yields:
        The number of a row's last line, and its cells; or a text, the reason why it cannot be read.

    Raises:
        MisconfigurationException: The file cannot be read.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            first = lines.readline()
            chosen = delimiter if delimiter and delimiter in first else max(DELIMITERS, key=first.count)
            reader = csv.reader(chain([first], lines), delimiter=chosen, skipinitialspace=True, strict=True)
            width = None
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, f"{error}; mend its quotes"
                    continue
                # Spreadsheets leave rows of empty cells.
                if any(row):
                    width = width or len(row)
                    fits = len(row) == width
                    yield reader.line_num, row if fits else f"there are {len(row)} cells for {width} columns"
    except OSError as error:
        raise MisconfigurationException(f"{file} cannot be read: {error.strerror}; give another file") from error


def no_number(cell: str) -> str:
    """What is wrong with a cell that is no finite number."""
    cell = cell.strip()
    return "the value is missing" if cell.lower() in MISSING else f"{cell:.100} is no number"


def to_number(cell: str) -> float:
    """A cell as a number; nan if it is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")

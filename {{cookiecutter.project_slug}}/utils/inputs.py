"""What `predict --input` reads: pictures, rows of a table, or an array, as datasets of (sample, name, fault).

A sample that cannot be read is zeros, so that its batch keeps its size, and its fault is the reason; others have "".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from engine import MisconfigurationException
from utils.pictures import files_below, picture_of_shape
from utils.registry import accepts, describe, load_class
from utils.tables import LARGEST, no_number, read_rows, to_number

KINDS = "a picture, a table (.csv, .tsv, .txt), what the dataset's read_file reads, a folder of it, or an array (.npy)"
TABLES = (".csv", ".tsv", ".txt")
# Columns that may name pictures, in any case, the likeliest first.
FILE_COLUMNS = ("image", "file", "path", "name", "filename")
Sample = tuple[Tensor, str, str]
# Reads a file as a sample of a shape.
Read = Callable[[Path, tuple[int, ...]], Tensor]


class Pictures(Dataset[Sample]):
    """Pictures by name.

    Args:
        folder: What names are relative to.
        names: Their names.
        read: Reads one.
        blank: Zeros, of the shape and type of a sample.
        faults: Reasons by number, of those that are known to be unreadable.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], read: Read, blank: Tensor, faults: dict[int, str] | None = None
    ) -> None:
        self.folder, self.names, self.read, self.blank, self.faults = folder, names, read, blank, faults or {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        file, fault = self.folder / self.names[index], self.faults.get(index, "")
        sample = self.blank
        if not fault and not os.path.exists(file):
            fault = f"there is no file {file}"
        if not fault:
            try:
                sample = torch.as_tensor(self.read(file, tuple(self.blank.shape))).to(self.blank.dtype)
            except Exception as error:
                fault = describe(error, "data").removeprefix(f"{file} ")
        if sample.shape != self.blank.shape:
            fault = f"it is read as {tuple(sample.shape)}, and the net takes {tuple(self.blank.shape)}"
        return (self.blank if fault else sample), self.names[index], fault


class TableRows(IterableDataset[Sample]):
    """TableRows of numbers, read one by one.

    Args:
        file: The table.
        delimiter: See `read_rows`.
        columns: Those that the net was trained on, in its order; others are left aside.
        blank: Zeros, of the shape and type of a sample.

    Raises:
        MisconfigurationException: A column is missing.
    """

    def __init__(self, file: Path, delimiter: str | None, columns: list[str], blank: Tensor) -> None:
        self.file, self.delimiter, self.columns, self.blank = file, delimiter, columns, blank
        header = _header(file, delimiter)
        if missing := [name for name in columns if name not in header]:
            what = f"has no column {', '.join(missing)}, from which the net predicts"
            raise MisconfigurationException(f"--input {file} {what}; it has {', '.join(header)}")
        if twice := [name for name in columns if header.count(name) > 1]:
            raise MisconfigurationException(f"--input {file} names the column {twice[0]} twice; keep one of them")
        self.positions = [header.index(name) for name in columns]

    def __iter__(self) -> Iterator[Sample]:
        rows = read_rows(self.file, self.delimiter)
        next(rows)
        for line, cells in rows:
            if isinstance(cells, str):
                yield self.blank, f"row {line}", cells
                continue
            values = [to_number(cells[position]) for position in self.positions]
            wrong = next((number for number, value in enumerate(values) if not abs(value) <= LARGEST), None)
            if wrong is None:
                yield torch.tensor(values, dtype=torch.float64).to(self.blank.dtype), f"row {line}", ""
            else:
                fault = no_number(cells[self.positions[wrong]])
                yield self.blank, f"row {line}", f"column {self.columns[wrong]}: {fault}"


class Array(Dataset[Sample]):
    """Samples of an array that stays on the disk.

    Args:
        array: Mapped into memory, of shape (samples, *shape).
        dtype: Type of a sample.
    """

    def __init__(self, array: np.ndarray, dtype: torch.dtype) -> None:
        self.array, self.dtype = array, dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Sample:
        # In the machine's order of bytes, which torch needs.
        row = np.array(self.array[index], dtype=self.array.dtype.newbyteorder("="))
        return torch.from_numpy(row).to(self.dtype), "", ""


def open_input(source: str, inputs: Mapping[str, Any] | None, data: Any) -> Dataset[Sample]:
    """What `--input` means, to a net that takes such samples.

    Args:
        source: Path of a picture, of a folder of them, of a table, or of an array.
        inputs: What the checkpoint says of samples: see `describe_inputs`.
        data: The DInterface of the run; it need not have any data.

    Raises:
        MisconfigurationException: There is no such file, or it does not suit the net.
    """
    path, suffix = Path(source), Path(source).suffix.lower()
    if not source or not os.path.exists(source):
        raise MisconfigurationException(f"--input {source!r}: there is no such file or folder; give {KINDS}")
    if not inputs:
        raise MisconfigurationException(
            "--input: the checkpoint does not say what a sample looks like, since the net was trained on samples that "
            "are no tensors; make a dataset of your files, and give --test_datasets"
        )
    blank = torch.zeros(inputs["shape"], dtype=getattr(torch, inputs["dtype"]))
    if suffix == ".npy" and path.is_file():
        return Array(_map(path, blank), blank.dtype)
    if suffix in TABLES and path.is_file() and inputs.get("columns"):
        return TableRows(path, data.data.get("delimiter"), list(inputs["columns"]), blank)
    own = getattr(load_class("data", data.train_name), "read_file", None)
    if own is None and not (blank.ndim == 3 and blank.shape[0] in (1, 3) and blank.is_floating_point()):
        wanted = "a table (.csv, .tsv, .txt)" if inputs.get("columns") else "an array (.npy)"
        raise MisconfigurationException(
            f"--input {path}: the net was trained on samples of shape {tuple(blank.shape)}, which are no pictures; "
            f"give {wanted}"
        )
    if own is None and list(inputs.get("range", ())) != [0, 1]:
        print(
            f"warning: pictures are read as numbers from 0 to 1; if {data.train_name} reads them otherwise, give it a "
            "static method read_file(file, shape)",
            file=sys.stderr,
        )
    return _pictures(path, own, blank, data)


def _pictures(path: Path, own: Read | None, blank: Tensor, data: Any) -> Pictures:
    read = own or picture_of_shape
    if path.is_dir():
        # What a dataset can read by itself may be called anything.
        names = files_below(path, path) if own is None else files_below(path, path, ("",))
        if not names:
            raise MisconfigurationException(f"--input {path}: the folder holds no pictures; give {KINDS}")
        return Pictures(path, names, read, blank)
    # Whoever reads texts itself has no table of pictures.
    if path.suffix.lower() in TABLES and not (own and path.suffix.lower() == ".txt" and blank.ndim != 3):
        names, faults = _named_in(path, data)
        return Pictures(path.parent, names, read, blank, faults)
    return Pictures(path.parent, [path.name], read, blank)


def _named_in(table: Path, data: Any) -> tuple[list[str], dict[int, str]]:
    """The files that a table names, a row each; and for rows that name none, by number, the reason."""
    column, delimiter = data.data.get("image_column"), data.data.get("delimiter")
    header = _header(table, delimiter)
    likely = {name.lower(): name for name in reversed(header)}
    chosen = column or next((likely[name] for name in FILE_COLUMNS if name in likely), None)
    if chosen not in header:
        hint = ", or give --data.image_column" if accepts(data.train_name, "image_column") else ""
        raise MisconfigurationException(
            f"--input {table} has no column {column or ', '.join(FILE_COLUMNS)} with the files of pictures; it has "
            f"{', '.join(header)}; name it {column or FILE_COLUMNS[0]}{hint}"
        )
    names: list[str] = []
    faults: dict[int, str] = {}
    rows = read_rows(table, delimiter)
    next(rows)
    for line, cells in rows:
        cell = "" if isinstance(cells, str) else cells[header.index(chosen)].strip()
        if not cell:
            faults[len(names)] = cells if isinstance(cells, str) else f"column {chosen}: the cell is empty"
        names.append(cell or f"row {line}")
    return names, faults


def _header(table: Path, delimiter: str | None) -> list[str]:
    """The names of a table's columns."""
    line, cells = next(read_rows(table, delimiter), (1, "it is empty"))
    if isinstance(cells, str) or any("\0" in cell for cell in cells):
        reason = cells if isinstance(cells, str) else "this is not UTF-8; save the table as CSV in UTF-8"
        raise MisconfigurationException(f"--input {table}, line {line}: {reason}; begin with a line of column names")
    return [cell.strip() for cell in cells]


def _map(file: Path, blank: Tensor) -> np.ndarray:
    """An array on the disk, mapped into memory, whose rows are like the sample."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise MisconfigurationException(f"--input {file} cannot be read as an array: {error}") from error
    kinds = "f" if blank.is_floating_point() else "b" if blank.dtype == torch.bool else "iu"
    fits = isinstance(array, np.ndarray) and array.dtype.kind in kinds and array.shape[1:] == tuple(blank.shape)
    if not fits or not array.ndim:
        given = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        wanted = ", ".join(["samples", *map(str, blank.shape)])
        kind = str(blank.dtype).removeprefix("torch.")
        raise MisconfigurationException(f"--input {file} holds {given}; the net takes {kind} of shape ({wanted})")
    if not len(array):
        raise MisconfigurationException(f"--input {file} holds no samples")
    return array

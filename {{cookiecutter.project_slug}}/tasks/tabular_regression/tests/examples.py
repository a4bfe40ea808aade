"""What the tests hand to a net or a dataset that needs more than its name: a line of flags, and tiny files."""

from __future__ import annotations

import csv
from pathlib import Path

# Flags by name; {folder} holds the files made below.
FLAGS: dict[str, list[str]] = {
    "csv_data": ["--data.file", "{folder}/table.csv", "--model_name", "mlp"],
    "mlp": ["--data.file", "{folder}/table.csv", "--dataset", "csv_data"],
}


def write_files(folder: Path) -> None:
    """A tiny table."""
    with (folder / "table.csv").open("w", newline="") as file:
        rows = [[number, number % 7, number * 0.5] for number in range(40)]
        csv.writer(file).writerows([["a", "b", "c"], *rows])

"""Tables of what was measured: on the terminal, and as files that the documentation is made of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "build" / "bench"
# Contenders, nets and settings are words; all other columns are numbers.
WORDS = ("net", "loop", "way", "what", "precision", "settings", "pipeline", "what grows", "loader")


def show(
    name: str, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Print a table, and keep it in `build/bench` for `publish.py`.

    Args:
        name: Of the file: one for each table.
        title: What was measured, and of what.
        headings: Of the columns.
        rows: Cells as they are printed.
        notes: Lines below the table.
    """
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in WORDS else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {"title": title, "headings": list(headings), "rows": [list(row) for row in rows], "notes": list(notes)}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")


def judged(figure: float, goal: float, at_least: bool = False) -> str:
    """A goal as a cell: what was to be reached, and whether it was."""
    met = figure >= goal if at_least else figure <= goal
    return f"{'≥' if at_least else '≤'} {goal:g} {'✓' if met else '✗'}"


def machine() -> str:
    """The machine, and the versions of Python and torch, in a line."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []

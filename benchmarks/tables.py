"""Tables of the benchmarks: rows with a figure, its ratio, the goal, and whether it was met.

A benchmark prints its tables and records them in `build/bench/`, a JSON file for each; `run.py` makes one page of all.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import environments
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

# Where results go; a benchmark that is started by hand writes to the same place.
RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parents[1] / "build" / "bench"))


@dataclass(frozen=True)
class Goal:
    """A limit of a figure.

    Attributes:
        limit: The limit.
        at_least: The figure is to be this large, or larger; otherwise this small, or smaller.
    """

    limit: float
    at_least: bool = False

    def met_by(self, value: float) -> bool:
        """Whether a figure keeps to it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass
class Row:
    """A line of a table.

    Attributes:
        name: What is measured.
        cells: Its figures, as text, by column.
        value: The figure that the goal is about, usually a ratio.
        goal: The goal, as text; empty for none.
        met: Whether it was met; None without goal.
    """

    name: str
    cells: dict[str, str]
    value: float | None = None
    goal: str = ""
    met: bool | None = None


@dataclass
class Table:
    """A title, rows and what to know for reading them.

    Attributes:
        title: What the rows have in common.
        first: Heading of the column of names.
        note: A sentence below.
        rows: The lines.
        key: Name of the table for programs, such as the plot.
    """

    title: str
    first: str = ""
    note: str = ""
    key: str = ""
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, cells: Mapping[str, str], value: float | None = None, goal: Goal | None = None) -> None:
        """Add a line; a goal is compared with the value."""
        met = None if goal is None or value is None else goal.met_by(value)
        self.rows.append(Row(name, dict(cells), value, "" if goal is None else str(goal), met))

    def grid(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and the text of every cell."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row.cells))
        judged = any(row.goal for row in self.rows)
        lines = []
        for row in self.rows:
            mark = {True: "✓", False: "✗", None: ""}[row.met]
            verdict = [row.goal, mark] if judged else []
            lines.append([row.name, *(row.cells.get(column, "") for column in columns), *verdict])
        return [self.first, *columns, *(["goal", "met"] if judged else [])], lines

    def show(self) -> None:
        """Print it."""
        headings, lines = self.grid()
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for line, row in zip(lines, self.rows, strict=True):
            table.add_row(*line, style={False: "red", True: "green", None: ""}[row.met])
        Console(width=130, highlight=False).print(table)
        if self.note:
            print(f" {self.note}\n", flush=True)

    def markdown(self) -> str:
        """The same for a page."""
        headings, lines = self.grid()
        bar = ["---", *["---:"] * (len(headings) - 1)]
        body = "\n".join(
            "| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in [headings, bar, *lines]
        )
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def record(part: str, tables: Sequence[Table]) -> None:
    """Print the tables of a benchmark, and write them where the page of all is made from."""
    for table in tables:
        table.show()
    RESULTS.mkdir(parents=True, exist_ok=True)
    peers = ", ".join(f"{name} {version}" for name, version in environments.versions().items())
    setting = {"machine": machine(), "peers": peers or "no peers", "commit": f"commit {commit() or 'unknown'}"}
    setting["date"] = time.strftime("%Y-%m-%d")
    content = {"setting": setting, "quick": "--quick" in sys.argv, "tables": [asdict(table) for table in tables]}
    # At once, so that a part that is broken off leaves what an earlier one found.
    unfinished = RESULTS / f"{part}.json.new"
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(RESULTS / f"{part}.json")


def recorded(part: str) -> list[Table]:
    """What `record` has written; empty if nothing."""
    tables = _content(part).get("tables", [])
    return [Table(**{**table, "rows": [Row(**row) for row in table["rows"]]}) for table in tables]


def settings(parts: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Machine, versions, commit and date: what all parts have in common, and for each part what it has not."""
    found: dict[str, dict[str, str]] = {part: _content(part)["setting"] for part in parts if _content(part)}
    every = [*found.values()]
    common = {
        name: value for name, value in (every[0] if every else {}).items() if all(s[name] == value for s in every)
    }
    own = {part: [value for name, value in one.items() if name not in common] for part, one in found.items()}
    return "; ".join(common.values()), {part: "; ".join(values) for part, values in own.items()}


def was_quick(parts: Sequence[str]) -> list[str]:
    """The parts whose last run shows only that they run."""
    return [part for part in parts if _content(part).get("quick")]


def _content(part: str) -> dict[str, Any]:
    path = RESULTS / f"{part}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # What an older version wrote does not say where it was measured.
    return content if "setting" in content else {}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def ratio_cells(ratios: Sequence[float]) -> dict[str, str]:
    """The columns of a ratio: its median, and between which values half of the rounds lie."""
    low, middle, high = spread(ratios)
    return {"ratio": f"{middle:.3f}", "half of the rounds": f"{low:.3f} to {high:.3f}"}


def machine() -> str:
    """Processor, cores, memory, system and versions, in one line."""
    processor, gigabytes = platform.processor() or platform.machine(), ""
    if (cpu := Path("/proc/cpuinfo")).is_file():
        lines = cpu.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gigabytes = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "torchmetrics", "numpy")]
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{processor}, {cores} cores{gigabytes}, {system}; {', '.join(versions)}"


def commit() -> str:
    """The commit of this repository, with a plus sign if files differ from it; empty where git does not know."""
    folder = Path(__file__).parent
    ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

"""What a start costs: imports, `--help`, from the start of the process to the first step, and the memory held by then.

Every figure is the median of several processes, which take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from contenders import BARE, OURS, Contender
from environments import python_of
from step import choose
from tables import Goal, Table, ratio_cells, record
from turns import ALONE, HERE
from work import PROJECT

# Ends the process as soon as an optimizer has stepped, and says so by its exit code. A project tries its optimizer
# on a parameter of its own first, which is no step.
STEPPED = 17
UNTIL_FIRST_STEP = f"""
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def end(optimizer, *_):
    if sum(len(group["params"]) for group in optimizer.param_groups) > 1:
        os._exit({STEPPED})
register_optimizer_step_post_hook(end)
"""


class Started(NamedTuple):
    """What a process has cost: seconds of CPU time, seconds on the wall, and MB that it held at most."""

    cpu: float
    wall: float
    megabytes: float


class Start(NamedTuple):
    """A process to start: its name, command line and the exit code that it should end with."""

    name: str
    command: list[str]
    code: int = 0


def measure(start: Start) -> Started:
    """Start a process, and wait for its end.

    Raises:
        RuntimeError: It has ended otherwise than expected.
    """
    path = os.pathsep.join([str(PROJECT), str(HERE)])
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as said:
        launcher = [sys.executable, "-S", str(HERE / "launch.py"), said.name, *start.command]
        environment = {**os.environ, **ALONE, "PYTHONPATH": path}
        told = subprocess.run(launcher, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True).stdout
        cost = json.loads(told)
        if cost.pop("code") != start.code:
            last = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{start.name}: ended otherwise than expected\n{last}")
    return Started(**cost)


def imports(chosen: list[Contender]) -> list[Start]:
    """Importing what users of each library import."""
    starts = {}
    for contender in chosen:
        package, _, name = contender.imported.rpartition(".")
        # Some libraries import lazily, so that only a name brings the code.
        line = f"from {package} import {name}" if name[:1].isupper() else f"import {contender.imported}"
        starts.setdefault(line, Start(line, [str(python_of(contender.environment)), "-c", line]))
    return list(starts.values())


def first_steps(chosen: list[Contender]) -> list[Start]:
    """Training until the first step is over: a script for each library, and `main.py` as it is generated."""
    starts = []
    for contender in chosen:
        script = (
            f"from contender import until_first_step; until_first_step({contender.module!r}, {contender.variant!r})"
        )
        command = [str(python_of(contender.environment)), "-c", UNTIL_FIRST_STEP + script]
        starts.append(Start(contender.name, command, STEPPED))
    main = f"sys.argv = ['main.py']; runpy.run_path({str(PROJECT / 'main.py')!r}, run_name='__main__')"
    return [*starts, Start("python main.py", [sys.executable, "-c", UNTIL_FIRST_STEP + main], STEPPED)]


def race(starts: list[Start], repeats: int) -> dict[str, list[Started]]:
    """Start everyone several times, in turns, in another order each time."""
    results: dict[str, list[Started]] = {start.name: [] for start in starts}
    orders = random.Random(0)
    for _ in range(repeats):
        for start in orders.sample(starts, len(starts)):
            results[start.name].append(measure(start))
    return results


def fill(table: Table, results: dict[str, list[Started]], reference: str, judged: str, peers: list[str]) -> Table:
    """A line for each, with ratios of CPU time to the reference, and one that compares with the fastest peer."""
    for name, runs in results.items():
        cpu, wall, held = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [run.cpu / other.cpu for run, other in zip(runs, results[reference], strict=True)]
        cells = {
            "CPU": f"{cpu:.2f} s",
            "wall": f"{wall:.2f} s",
            "peak memory": f"{held:,.0f} MB",
            **ratio_cells(ratios),
        }
        table.add(name, cells, statistics.median(ratios))
    if peers:
        fastest = min(peers, key=lambda name: statistics.median(run.cpu for run in results[name]))
        ratios = [run.cpu / other.cpu for run, other in zip(results[judged], results[fastest], strict=True)]
        middle = round(statistics.median(ratios), 3)
        table.add(f"{judged} / fastest peer ({fastest})", ratio_cells(ratios), middle, Goal(1.0))
    return table


def main() -> None:
    """Start everything, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each once, without peers")
    parser.add_argument("--repeats", type=int, default=6, help="processes of each [6]")
    arguments = parser.parse_args()
    chosen, repeats = choose(arguments.quick), 1 if arguments.quick else arguments.repeats
    note = f"Medians of {repeats} processes; ratios are of CPU time."
    importing = race(imports(chosen), repeats)
    others = [line for line in importing if line not in ("import torch", "import engine")]
    tables = [
        fill(Table("import", "line", note, "start/import"), importing, "import torch", "import engine", others),
    ]
    commands = [Start("import torch", [sys.executable, "-c", "import torch"])]
    commands.append(Start("python main.py --help", [sys.executable, str(PROJECT / "main.py"), "--help"]))
    title = "the command line of a generated project"
    tables.append(fill(Table(title, "command", note, "start/help"), race(commands, repeats), "import torch", "", []))
    steps = race(first_steps(chosen), repeats)
    others = [contender.name for contender in chosen if contender.environment is not None]
    title = "from the start of the process to the end of the first step"
    tables.append(fill(Table(title, "script", note, "start/first step"), steps, BARE, OURS, others))
    record("start", tables)


if __name__ == "__main__":
    main()

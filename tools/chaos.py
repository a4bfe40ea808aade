"""Kill training runs at random moments, go on with `--ckpt_path auto`, and compare with a run that nobody killed.

    python tools/chaos.py --kills 200 --seed 0 [--processes 2]

Each start is a fork of this process, which has torch loaded already. The child tells in shared memory which phase it
is in; there, or after a random time, this process sends it SIGKILL. Once a start gets to its end, everything that the
run left behind has to have the bits of the reference: checkpoints, metrics.csv, TensorBoard's scalars, results.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, cast

import torch
from comparison import compare
from rich.console import Console
from rich.table import Table

Function = Callable[..., Any]
ROOT = Path(__file__).parents[1]
PHASES = ("start", "training", "validation", "epoch end", "test", "writing", "renaming")
ANY_TIME, KILLED, OUTPUT = "any time", -signal.SIGKILL, "output.txt"
# Seconds after which a start that neither ends nor gets to its kill counts as hanging.
LIMIT = 120.0
# Seconds that torchrun's other processes have to end after the first.
GRACE = 5.0
# Faulty runs after which a scenario is given up.
MOST = 5
# Every second kill aims at one of so many last events of its phase: there a run may look complete, and is not.
LAST = 12
# System calls that change what a folder shows; a kill strikes before or after one.
FILE_CALLS = ("fsync", "replace", "link", "unlink", "truncate", "mkdir")

# Four epochs of 7 batches, of a net with dropout on images that are moved at random.
COMMON = (
    "--accelerator cpu --batch_size 8 --max_epochs 4 --limit_train_batches 7 --limit_val_batches 3 "
    "--limit_test_batches 2 --log_every_n_steps 1 --enable_progress_bar false --enable_model_summary false "
    "--model.width 4 --model.dropout 0.3 --data.augment true --ckpt_path auto"
)
SCENARIOS = {
    "plain": "--num_workers 0",
    "within epochs": "--num_workers 0 --save_every_n_steps 2 --gradient_clip_val 0.5",
    "workers": "--num_workers 2 --save_every_n_steps 3 --lr_schedule onecycle --mixup 0.4",
    "accumulation": "--num_workers 0 --accumulate_grad_batches 3 --save_every_n_steps 1 --lr_schedule plateau "
    "--lr_schedule_args.patience 0 --lr_schedule_args.factor 0.5 --log_every_n_steps 2",
    "ema": "--num_workers 0 --ema_decay 0.9 --save_every_n_steps 2 --lr_schedule onecycle --cutmix 1",
    "bf16": "--num_workers 2 --precision bf16-mixed --save_every_n_steps 2 --accumulate_grad_batches 2",
    "stopping": "--num_workers 0 --patience 1 --lr 0.3 --monitor val_acc --check_val_every_n_epoch 2 --max_epochs 6 "
    "--balanced_sampling true",
    "async": "--num_workers 0 --async_save true --save_every_n_steps 1 --lr_schedule plateau",
    "all": "--num_workers 2 --async_save true --save_every_n_steps 2 --ema_decay 0.9 --precision bf16-mixed "
    "--accumulate_grad_batches 2 --lr_schedule plateau --lr_schedule_args.patience 0 --mixup 0.4",
}


class Moment(NamedTuple):
    """When to kill: so many seconds after an event of a phase, or after the start (ANY_TIME)."""

    phase: str | None
    event: int = 0
    seconds: float = 0.0


NEVER = Moment(None)


class Board:
    """What a child tells of itself, in memory that outlives it.

    Cells: number of the phase of training; of the file that is being written, 0 for none; of the phase in which the
    child waits to be killed, -1 while it does not; then the events of each phase.

    Attributes:
        processes: How many train together; the first of them is the one that tells.
    """

    processes = 1

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def clear(self) -> None:
        """Before a start."""
        for number, value in enumerate([0, 0, -1] + [0] * len(PHASES)):
            self.cells[number] = value

    @property
    def phase(self) -> str:
        """Where the child is, or was when it was killed."""
        return PHASES[self.cells[2] if self.cells[2] >= 0 else self.cells[1] or self.cells[0]]

    @property
    def events(self) -> dict[str, int]:
        """Events by phase."""
        return {phase: self.cells[3 + number] for number, phase in enumerate(PHASES)}


class Probe:
    """Tells the board what this process does, and waits at the moment of its kill."""

    def __init__(self, board: Board, moment: Moment) -> None:
        self.cells, self.moment, self.pid = board.cells, moment, os.getpid()
        # Of the thread: with --async_save one writes while the other trains.
        self.own = threading.local()

    def event(self, phase: str | None = None) -> None:
        """Something happens next: a step, a change on disk, or another phase of training."""
        if os.getpid() != self.pid:
            return  # one of the processes that read data
        if phase is not None:
            self.cells[0] = PHASES.index(phase)
        number = getattr(self.own, "file", 0) or self.cells[0]
        self.cells[3 + number] += 1
        if (PHASES[number], self.cells[3 + number]) == self.moment[:2]:
            self.cells[2] = number
            time.sleep(2 * LIMIT)

    def around(self, function: Function, phase: str | None = None, then: str | None = None) -> Function:
        """Each call of `function` begins and ends with an event, with which training may come to another phase."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.event(phase)
            result = function(*args, **kwargs)
            self.event(then)
            return result

        return watched

    @contextlib.contextmanager
    def file(self, phase: str) -> Iterator[None]:
        """A checkpoint's file is in a phase meanwhile."""
        outside = getattr(self.own, "file", 0)
        self.own.file = self.cells[1] = PHASES.index(phase)
        try:
            yield
        finally:
            self.own.file = self.cells[1] = outside


def instrument(probe: Probe) -> None:
    """Let the engine's functions tell the probe when they run, in this process."""
    names = ("engine.loops", "engine.checkpoint", "engine.checkpoint_writer", "model", "torch")
    loops, checkpoint, writer, model, library = (cast(Any, importlib.import_module(name)) for name in names)
    loops.train_epoch = probe.around(loops.train_epoch, "training")
    loops.validate_in_fit = probe.around(loops.validate_in_fit, "validation", then="epoch end")
    loops.fit_epochs = probe.around(loops.fit_epochs, then="test")
    writer.save = probe.file("writing")(writer.save)
    checkpoint.link = probe.file("renaming")(checkpoint.link)
    checkpoint._commit = probe.file("renaming")(checkpoint._commit)
    for step in ("training_step", "validation_step", "test_step"):
        setattr(model.MInterface, step, probe.around(getattr(model.MInterface, step)))
    for name in FILE_CALLS:
        setattr(os, name, probe.around(getattr(os, name)))
    save = library.save

    def save_in_pieces(content: Any, file: Any, **options: Any) -> None:
        if options:
            # A tensor on its way to another process.
            save(content, file, **options)
            return
        # Each piece gets to the disk at once, so that a kill leaves a part of the file.
        write = probe.around(lambda piece: (file.write(piece), file.flush())[0])
        save(content, SimpleNamespace(write=write, flush=file.flush))

    library.save = save_in_pieces


def child(words: list[str], folder: Path, probe: Probe | None, environment: dict[str, str]) -> NoReturn:
    """Run main.py's `main` in a folder, and end this process; output and results go into files there."""
    code: Any = 1
    try:
        os.environ.update(environment)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if probe is not None:
            instrument(probe)
        results = importlib.import_module("main").main(words)
        if probe is not None:
            Path("results.json").write_text(json.dumps({name: repr(results[name]) for name in sorted(results)}))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def environments(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of several processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def end_others(pids: list[int]) -> None:
    """The first process has ended: ask the others to end, and do not ask twice."""
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while pids:
        time.sleep(0.001)
        if time.monotonic() > end:
            os.kill(pids[0], signal.SIGKILL)
        pids = [pid for pid in pids if not os.waitpid(pid, os.WNOHANG)[0]]


def start(words: list[str], folder: Path, board: Board, moment: Moment = NEVER) -> int:
    """Start a run, or go on with it, and kill it at a moment if it gets there; returns its exit code, or `KILLED`.

    Of several processes the first is killed, and the others as torchrun does it.
    """
    board.clear()
    sys.stdout.flush()
    begin, elapsed, others = time.monotonic(), 0.0, list[int]()
    for rank, environment in reversed([*enumerate(environments(board.processes))]):
        if not (pid := os.fork()):
            child(words, folder, None if rank else Probe(board, moment), environment)
        others += [pid] if rank else []
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        elapsed = time.monotonic() - begin
        if waits := board.cells[2] >= 0:
            # With --async_save training goes on meanwhile.
            time.sleep(moment.seconds)
        if waits or elapsed > (moment.seconds if moment.phase == ANY_TIME else LIMIT):
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    end_others(others)
    if elapsed > LIMIT:
        raise TimeoutError(f"a start did not end within {LIMIT:.0f} s; its last phase: {board.phase}")
    return os.waitstatus_to_exitcode(ended[1])


class Report:
    """What became of a scenario."""

    def __init__(self, scenario: str) -> None:
        self.scenario, self.runs, self.starts, self.seconds = scenario, 0, 0, 0.0
        self.kills: Counter[str] = Counter()
        self.differences: list[str] = []


def torment(report: Report, words: list[str], phases: list[str], chance: random.Random, folder: Path) -> None:
    """Make a reference, then kill runs of the same arguments, each until it is through, once in each of `phases`."""
    board, begin = Board(), time.monotonic()
    reference = folder / "reference"
    if start(words, reference, board):
        raise RuntimeError(f"the reference failed: {(reference / OUTPUT).read_text()[-2000:]}")
    usual, events = time.monotonic() - begin, board.events
    faulty = 0
    while phases and faulty < MOST:
        run, code = folder / f"run_{report.runs}", KILLED
        report.runs += 1
        while code == KILLED:
            code = start(words, run, board, choose(phases[0], events, usual, chance) if phases else NEVER)
            report.starts += 1
            if code == KILLED:
                report.kills[board.phase] += 1
                phases.pop(0)
        found = [f"exit code {code}: {(run / OUTPUT).read_text()[-2000:]}"] if code else compare(reference, run)
        found += again(words, run)
        report.differences += [f"{run}: {difference}" for difference in found]
        faulty += bool(found)
        if not found:
            shutil.rmtree(run)
    report.seconds = time.monotonic() - begin


def again(words: list[str], run: Path) -> list[str]:
    """What is wrong with another start of a run that is complete: it has nothing to do."""
    board = Board()
    code = start(words, run, board)
    steps = board.events["training"]
    return [f"another start: exit code {code}, {steps} events of training"] if code or steps else []


def choose(phase: str, events: dict[str, int], usual: float, chance: random.Random) -> Moment:
    """A moment in a phase, of which the reference had so many events: among its last, or rather early to kill often."""
    if phase == ANY_TIME:
        return Moment(phase, seconds=chance.uniform(0, usual))
    late = events[phase] - chance.randrange(min(LAST, events[phase]))
    early = 1 + int(events[phase] * chance.random() ** 2)
    return Moment(phase, late if chance.random() < 0.5 else early, chance.uniform(0, 0.03))


def show(reports: list[Report]) -> None:
    """Print a table."""
    table = Table("scenario", "runs", "starts", "kills", *PHASES, "identical", "seconds")
    total = Report("total")
    for report, name in itertools.product(reports, vars(total).keys() - {"scenario"}):
        setattr(total, name, getattr(total, name) + getattr(report, name))
    for report in [*reports, total]:
        table.add_section() if report is total else None
        counts = [report.runs, report.starts, report.kills.total(), *(report.kills[phase] for phase in PHASES)]
        identical = "[red]no[/]" if report.differences else "yes"
        table.add_row(report.scenario, *map(str, counts), identical, f"{report.seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(*total.differences, sep="\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all scenarios together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of the runs")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, metavar="NAME")
    parser.add_argument("--project", type=Path, default=ROOT / "{{cookiecutter.project_slug}}")
    parser.add_argument("--folder", type=Path, help="keep the runs' folders here")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    return parser.parse_args()


def prepare(project: Path) -> None:
    """Import in this process all that a start needs, so that a fork begins at once."""
    sys.path.insert(0, str(project))
    # No cache may lie in the template's folder, which is copied as it is.
    sys.pycache_prefix = sys.pycache_prefix or str(ROOT / ".cache" / "pycache")
    # Threads do not survive a fork, and would only wait for each other.
    torch.set_num_threads(1)
    for module in ("main", "data.standard_data", "model.standard_net", "torch.utils.tensorboard"):
        importlib.import_module(module)


def main() -> int:
    """Run all scenarios; returns 1 if anything differs."""
    arguments = parse()
    print(f"seed {arguments.seed}", flush=True)
    prepare(arguments.project)
    Board.processes = arguments.processes
    folder, reports = (arguments.folder or Path(tempfile.mkdtemp(prefix="chaos"))).resolve(), []
    others = itertools.cycle(["validation", "epoch end", ANY_TIME, "renaming", "test", "training", "start", ANY_TIME])
    for number, name in enumerate(arguments.scenarios):
        kills = len(range(number, arguments.kills, len(arguments.scenarios)))
        phases = ["writing" if not kill % 5 else next(others) for kill in range(kills)]
        words = [*COMMON.split(), *SCENARIOS[name].split(), "--seed", str(arguments.seed)]
        reports.append(report := Report(name))
        try:
            torment(report, words, phases, random.Random(f"{arguments.seed} {name}"), folder / name)
        except (TimeoutError, RuntimeError) as error:
            report.differences.append(f"{name}: {error}")
        print(f"{name}: {report.kills.total()} kills, {len(report.differences)} differences", flush=True)
    show(reports)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(report) for report in reports], indent=2))
    failed = any(report.differences for report in reports)
    if failed:
        print(f"what differs lies beside its reference in {folder}")
    elif arguments.folder is None:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

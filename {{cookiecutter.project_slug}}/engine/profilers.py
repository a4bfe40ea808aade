"""Profilers: where the time of a run goes. The Trainer has each of its actions recorded, by name.

They work on their own, too:

    profiler = SimpleProfiler()
    with profiler.profile("read"):
        ...
    profiler.describe()
"""

from __future__ import annotations

import inspect
import io
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, record_function

from engine.distributed import is_rank_zero, rank_zero_warn
from engine.exceptions import MisconfigurationException
from engine.loggers.logger import make_folder


class Profiler:
    """Base of all profilers: write `start` and `stop`, and what `summary` tells of them.

    Args:
        dirpath: Folder for what is written; within a run that of the run by default.
        filename: Name in that folder for the summary, which is printed otherwise.
    """

    # Set by the Trainer: what is run.
    _lightning_module: Any = None
    _stage: str | None = None
    _local_rank: int | None = None

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath, self.filename = dirpath, filename

    def start(self, action_name: str) -> None:
        """An action begins; others may run around it and within it."""
        raise NotImplementedError

    def stop(self, action_name: str) -> None:
        """It is over."""
        raise NotImplementedError

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Around an action."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """What was recorded, as text."""
        return ""

    def describe(self) -> None:
        """Print the summary at the end of a stage, or add it to the file; then `teardown`."""
        report = self.summary()
        if report and self.dirpath is not None and self.filename:
            make_folder(Path(self.dirpath))
            with open(Path(self.dirpath, f"{self._file_stem()}.txt"), "a", encoding="utf-8") as file:
                file.write(report)
        elif report and is_rank_zero():
            self._print(report)
        self.teardown(self._stage)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A stage begins: "fit", "validate", "test" or "predict"; with a rank where there are several processes."""
        self._stage, self._local_rank, self.dirpath = stage, local_rank, self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:
        """A stage is over, and has been described."""

    def _print(self, report: str) -> None:
        print(report)

    def _file_stem(self) -> str:
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank) if part]
        return re.sub(r'[\\/:*?"<>|\s]+', "_", "-".join(parts)) or "profile"

    def _title(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"


class PassThroughProfiler(Profiler):
    """Records nothing."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""


class SimpleProfiler(Profiler):
    """Times every action, on the host, and sums up.

    Args:
        dirpath: Folder for the file; within a run that of the run by default.
        filename: Name of a file for the table, which is printed otherwise.
        extended: Tell the number of calls and the share of the time, too.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        self.start_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Note the time."""
        if action_name in self.current_actions:
            raise MisconfigurationException(f"profiler: {action_name!r} was started twice; stop it first")
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Note how long it took."""
        now = time.perf_counter()
        if action_name not in self.current_actions:
            raise MisconfigurationException(f"profiler: {action_name!r} was never started")
        self.recorded_durations[action_name].append(now - self.current_actions.pop(action_name))

    def summary(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=1000, markup=False, color_system=None)
        console.print(self._table())
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def _table(self) -> Any:
        from rich.table import Table

        total = time.perf_counter() - self.start_time
        look: dict[str, Any] = {"title_justify": "left", "box": None, "header_style": "bold", "pad_edge": False}
        table = Table("Action", title=self._title(), **look)
        extra = ("Num calls", "Percentage %") if self.extended else ()
        for heading in ("Mean duration (s)", "Total time (s)", *extra):
            table.add_column(heading, justify="right")
        rows = [(sum(times), len(times), name) for name, times in self.recorded_durations.items()]
        if self.extended:
            table.add_row("Total", "", f"{total:.4f}", str(sum(calls for _, calls, _ in rows)), "100.0")
        for seconds, calls, name in sorted(rows, reverse=True):
            shares = (str(calls), f"{100 * seconds / total:.1f}") if self.extended else ()
            table.add_row(name, f"{seconds / calls:.3g}", f"{seconds:.4f}", *shares)
        return table

    def _print(self, report: str) -> None:
        from rich.console import Console

        console = Console(markup=False)
        if console.is_terminal:
            console.print(self._table())
        else:
            print(report)


class PyTorchProfiler(Profiler):
    """Has `torch.profiler` record operators, on CPU and GPU, in some steps of a stage; and writes a trace of them.

    The trace, a `.pt.trace.json` in `dirpath`, is for Perfetto (ui.perfetto.dev) or chrome://tracing.

    Args:
        dirpath: Folder for the trace; within a run that of the run by default.
        filename: Name of a file for the table of operators, which is printed otherwise; also begins the trace's name.
        group_by_input_shapes: Tell calls with different shapes apart; with `record_shapes=True`.
        export_to_chrome: Write the trace.
        row_limit: Rows of the table; -1 for all.
        sort_by_key: Column by which it is sorted.
        record_module_names: Show in the trace which submodule operators belong to.
        table_kwargs: Further arguments of the table (`EventList.table`).
        **profiler_kwargs: Further arguments of `torch.profiler.profile`. Its `schedule` counts the steps of the stage
            (in fit, training steps); by default it skips one, warms up in one, and records three.

    Raises:
        MisconfigurationException: An argument is none of `torch.profiler.profile`, or makes no sense.
    """

    STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    AVAILABLE_SORT_KEYS = {
        *("cpu_time", "cuda_time", "cpu_time_total", "cuda_time_total", "cpu_memory_usage", "cuda_memory_usage"),
        *("self_cpu_memory_usage", "self_cuda_memory_usage", "count"),
    }

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        known = inspect.signature(torch.profiler.profile).parameters
        if unknown := [name for name in profiler_kwargs if name not in known]:
            raise MisconfigurationException(f"PyTorchProfiler({unknown[0]}=...): torch.profiler has {', '.join(known)}")
        schedule = profiler_kwargs.get("schedule")
        if schedule is not None and not (callable(schedule) and isinstance(schedule(0), ProfilerAction)):
            raise MisconfigurationException(f"schedule={schedule!r}; give one of torch.profiler.schedule(...)")
        self._sort_by = sort_by_key or f"{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        if self._sort_by not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"sort_by_key={sort_by_key!r}; give one of {', '.join(sorted(self.AVAILABLE_SORT_KEYS))}"
            )
        self._by_shapes, self._export, self._row_limit = group_by_input_shapes, export_to_chrome, row_limit
        self._name_modules, self._table_options = record_module_names, table_kwargs or {}
        self._options = profiler_kwargs
        self.profiler: torch.profiler.profile | None = None
        self._open: dict[str, list[Any]] = defaultdict(list)
        self._hooks: list[Any] = []

    def start(self, action_name: str) -> None:
        """Begin an action in the trace."""
        if self.profiler is None:
            self._begin()
        self._enter(f"[pl][profile]{action_name}")

    def stop(self, action_name: str) -> None:
        """End it; at the end of a step of the stage, go on in the schedule."""
        self._exit(f"[pl][profile]{action_name}")
        step = self.STEPS.get(self._stage or "", "_step")
        if self.profiler is not None and action_name.endswith(step):
            self.profiler.step()

    def summary(self) -> str:
        """The operators of the steps that were recorded, by the time that they took."""
        if self.profiler is None:
            return ""
        self.profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        none = self.profiler.profiler is None
        averages: Any = () if none else self.profiler.key_averages(group_by_input_shape=self._by_shapes)
        if not averages:
            rank_zero_warn("PyTorchProfiler: the stage was over before its schedule came to record a step")
            return ""
        table = averages.table(sort_by=self._sort_by, row_limit=self._row_limit, **self._table_options)
        return f"{self._title()}\n{table}"

    def teardown(self, stage: str | None) -> None:
        """Be ready for another stage."""
        self.profiler = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self) -> None:
        short = self._batches() < 5
        default = None if short else torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
        options = {"schedule": default, "on_trace_ready": self._write_trace if self._export else None}
        self.profiler = torch.profiler.profile(**{**options, **self._options})
        self.profiler.__enter__()  # type: ignore[no-untyped-call]
        modules = self._lightning_module.named_modules() if self._lightning_module and self._name_modules else ()
        for name, part in modules:
            if name:
                label = f"[pl][module]{type(part).__module__}.{type(part).__name__}: {name}"
                enter, leave = partial(self._enter, label), partial(self._exit, label)
                self._hooks.append(part.register_forward_pre_hook(enter))
                self._hooks.append(part.register_forward_hook(leave, always_call=True))

    def _batches(self) -> float:
        """Batches of the stage, as far as that is known."""
        if self._lightning_module is None:
            return float("inf")
        trainer = self._lightning_module.trainer
        kind = {"validate": "val"}.get(self._stage or "", self._stage)
        return float(trainer.num_training_batches if kind == "fit" else sum(getattr(trainer, f"num_{kind}_batches")))

    def _enter(self, label: str, *_: Any) -> None:
        record = record_function(label)
        record.__enter__()  # type: ignore[no-untyped-call]
        self._open[label].append(record)

    def _exit(self, label: str, *_: Any) -> None:
        if self._open[label]:
            self._open[label].pop().__exit__(None, None, None)

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        make_folder(folder := Path(self.dirpath or "."))
        torch.profiler.tensorboard_trace_handler(str(folder), self._file_stem())(profiler)


PROFILERS = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}


def make_profiler(profiler: Any) -> Any:
    """What the `profiler` argument of the Trainer stands for: a name, a profiler of whatever make, or None.

    Raises:
        MisconfigurationException: It is neither.
    """
    if isinstance(profiler, str) and profiler.lower() in PROFILERS:
        return PROFILERS[profiler.lower()]()
    own = not isinstance(profiler, type) and all(hasattr(profiler, name) for name in ("profile", "setup", "describe"))
    if profiler is None or own:
        return profiler
    raise MisconfigurationException(f"profiler={profiler!r}; give {', '.join(PROFILERS)}, or a Profiler")


def profiled(profiler: Profiler, action: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` as an action of the profiler; of one that records nothing, `work` itself."""
    if type(profiler) is PassThroughProfiler:
        return work

    @wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return work(*args, **kwargs)

    return run


def fetched(profiler: Profiler, action: str, batches: Iterator[Any]) -> Iterator[Any]:
    """Batches, each fetched as an action of the profiler; for one that records nothing, as they are."""
    return (
        batches if type(profiler) is PassThroughProfiler else iter(profiled(profiler, action, batches.__next__), None)
    )

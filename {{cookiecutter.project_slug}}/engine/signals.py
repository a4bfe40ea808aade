"""Stopping from outside: signals and `max_time`, heeded at the next optimizer step by all processes at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine import distributed
from engine.exceptions import MisconfigurationException

# What may ask for a stop, the most urgent last: processes agree on the greatest.
TIME, USR1, ORPHAN, TERM, INT = 1, 2, 3, 4, 5
NAMES = {TIME: "max_time", USR1: "SIGUSR1", ORPHAN: "torchrun has ended", TERM: "SIGTERM", INT: "Ctrl-C"}
SIGNALS = {name: getattr(signal, name) for name in ("SIGUSR1", "SIGTERM", "SIGINT") if hasattr(signal, name)}
# Seconds between two agreements of several processes, about: each costs what hundreds of calls of Python do.
BETWEEN_AGREEMENTS = 0.1
# Exit code of a process that was asked to end, as shells count: 128 + SIGTERM.
EXIT_CODE = 143
# The process that has started this one under torchrun, which ends what it has started, unless it is killed itself.
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


class StopRequest:
    """Remembers that somebody wants the run to stop; as a context manager, it listens to signals.

    A handler only sets a number. Signals that the program handles itself are left to it. A second Ctrl-C raises
    KeyboardInterrupt at once.

    Args:
        seconds: How long the run may take from now.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._several = False
        self._end = None if seconds is None else time.monotonic() + seconds
        self._received = 0
        self._in_flight: tuple[Any, torch.Tensor] | None = None
        # When the last agreement was begun, calls of `agreed` since then, and after how many the next one is due.
        self._begun, self._calls, self._every = 0.0, 0, 1
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._several = distributed.world_size() > 1
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS.values():
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._in_flight = None

    def pending(self) -> int:
        """What this process knows of: 0, or one of the constants above."""
        if LAUNCHER is not None and os.getppid() != LAUNCHER:
            return max(self._received, ORPHAN)
        return self._received or (TIME if self._end is not None and time.monotonic() >= self._end else 0)

    def agreed(self, now: bool = False) -> int:
        """What all processes know of, asked by all of them at the same step.

        Across processes numbers travel while a step computes, so that nobody waits: an answer is one call late. They
        set out about every `BETWEEN_AGREEMENTS` seconds; the process of rank 0 says with each after how many calls the
        next ones do, so that all of them count alike.

        Args:
            now: Wait for the answer.
        """
        if not self._several:
            return self._received if self._end is None and LAUNCHER is None else self.pending()
        self._calls += 1
        known = self._answer()
        if now or self._calls >= self._every:
            numbers = torch.tensor([self.pending(), self._calls_between() if distributed.is_rank_zero() else 0])
            self._in_flight = dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True), numbers
            self._calls = 0
        return max(known, self._answer()) if now else known

    def agreed_anew(self) -> int:
        """As `agreed` now; the calls that follow may take longer than those before, so that they agree at once."""
        known = self.agreed(now=True)
        self._every = 1
        return known

    def _answer(self) -> int:
        """What the agreement that was begun has found; 0 where there is none."""
        if self._in_flight is None:
            return 0
        (work, numbers), self._in_flight = self._in_flight, None
        work.wait()
        known, self._every = numbers.tolist()
        return int(known)

    def _calls_between(self) -> int:
        """Calls until the next agreement; twice as many as to this one at most, since they may come to take longer."""
        now = time.monotonic()
        seconds, self._begun = now - self._begun, now
        return max(1, min(2 * self._calls, int(BETWEEN_AGREEMENTS * self._calls / max(seconds, 1e-6))))

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received == INT:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        self._received = max(self._received, {"SIGUSR1": USR1, "SIGTERM": TERM, "SIGINT": INT}[name])


@contextmanager
def quiet_children() -> Iterator[None]:
    """Keep torch from raising, in the midst of a tear-down, that a worker has died: it does so with every other."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def leave(reason: int) -> None:
    """End a run that all processes have agreed to stop, once all is saved; `max_time` ends it without an error.

    After SIGUSR1 a job of Slurm is put back into the queue (as `#SBATCH --signal=USR1@120` asks it to be).

    Args:
        reason: One of the constants above, or 0 for none.

    Raises:
        KeyboardInterrupt: It was Ctrl-C.
        SystemExit: With code 143, after the other signals, and where the launcher was killed.
    """
    if reason == INT:
        raise KeyboardInterrupt
    if reason == USR1 and "SLURM_JOB_ID" in os.environ:
        if distributed.is_rank_zero():
            _requeue()
        # The first process that ends has Slurm kill the others, which would be before the job is queued.
        distributed.barrier()
    if reason in (USR1, ORPHAN, TERM):
        raise SystemExit(EXIT_CODE)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        print(f"Slurm: job {job} is in the queue again", flush=True)
    except (OSError, subprocess.SubprocessError) as error:
        answer = str(getattr(error, "stderr", "") or error).strip()
        distributed.rank_zero_warn(f"{' '.join(command)} failed ({answer}); queue the job again by hand")


def seconds_of(max_time: Any, name: str = "max_time") -> float | None:
    """Seconds of "days:hours:minutes:seconds", of a timedelta, or of its arguments in a dict.

    Raises:
        MisconfigurationException: It is none of these, or not positive.
    """
    if max_time is None:
        return None
    span = max_time
    try:
        if isinstance(span, str) and (parts := re.fullmatch(r"(\d+):(\d\d?):(\d\d?):(\d\d?)", span)):
            span = timedelta(
                **dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts.groups()), strict=True))
            )
        elif isinstance(span, dict):
            span = timedelta(**span)
    except (TypeError, ValueError, OverflowError):
        span = timedelta()
    if not isinstance(span, timedelta) or span <= timedelta():
        raise MisconfigurationException(f"{name}={max_time!r}; give days:hours:minutes:seconds, such as 00:12:00:00")
    return span.total_seconds()

"""Real faults for tests: a disk that fills up, rights that are lost, processes that are killed, hooks that act."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import engine
import pytest
import torch
from engine import distributed, last_words
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SECONDS = 60


class Acts(engine.Callback):
    """Does something at one call of one hook (counted from 1); made by `at`."""

    action: Callable[[engine.Trainer], Any]
    when = 0
    calls = 0

    def act(self, trainer: engine.Trainer) -> None:
        if not trainer.sanity_checking:
            self.calls += 1
            if self.calls == self.when:
                type(self).action(trainer)


def at(hook: str, when: int, action: Callable[[engine.Trainer], Any]) -> Acts:
    """A callback that calls `action(trainer)` at the call number `when` of `hook`; all have the same state key."""

    def method(self: Acts, trainer: engine.Trainer, *args: Any) -> None:
        self.act(trainer)

    kind = type("Acts", (Acts,), {hook: method, "action": staticmethod(action), "when": when})
    kind.__qualname__ = "Acts"
    made: Acts = kind()
    return made


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Fail rather than hang."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Space:
    """A folder on a disk that can be filled up."""

    folder: Path

    def fill(self) -> None:
        raise NotImplementedError

    def free(self) -> None:
        raise NotImplementedError


class FileLimit(Space):
    """No file may become larger than so many bytes: works everywhere, for any user."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        # Python ignores SIGXFSZ, so that writing fails with EFBIG.
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class SmallDisk(Space):
    """A file system of its own, with another file that takes what is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        try:
            with open(self.folder / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@contextmanager
def space(kind: str, folder: Path, limit: int = 40_000, size: str = "1m") -> Iterator[Space]:
    """A `FileLimit` ("limit") or a `SmallDisk` ("disk", skipped where mounting is not allowed), as the working folder.

    Args:
        kind: Which of them.
        folder: Where.
        limit: Largest file, in bytes.
        size: Size of the disk.
    """
    made: Space = FileLimit(folder, limit)
    if kind == "disk":
        folder = folder / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"there is no mount: {error}")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        made = SmallDisk(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield made
    finally:
        made.free()
        os.chdir(before)
        if kind == "disk":
            subprocess.run(["umount", "-l", str(folder)], check=True)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def ordinary_user() -> Iterator[None]:
    """File permissions count for root, too: without its capabilities, of this thread and those that it starts."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("rights of root can be put aside on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    # Version 3 of the kernel's interface has two words of each set.
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = [each.effective for each in sets]
    for each in sets:
        each.effective = 0
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        for each, effective in zip(sets, before, strict=True):
            each.effective = effective
        assert libc.capset(ctypes.byref(header), sets) == 0


class Apart:
    """Runs a function in a copy of this process, which ends as an interpreter would; saves importing torch again.

    Args:
        work: What to run.
        group: Make it the head of a process group of its own.
    """

    def __init__(self, work: Callable[[], Any], *, group: bool = False) -> None:
        self.files = Path(f"out-{time.monotonic_ns()}"), Path(f"err-{time.monotonic_ns()}")
        for file in self.files:
            file.touch()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(work, group))
        self.process.start()

    def _run(self, work: Callable[[], Any], group: bool) -> None:
        if group:
            os.setsid()
        for number, file in zip((1, 2), self.files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        # A shell starts what it puts into the background with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            work()
        except KeyboardInterrupt:
            traceback.print_exc()
            raise SystemExit(130) from None

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until it has printed `text` so often."""
        end = time.monotonic() + SECONDS
        while self.out.count(text) < times:
            assert self.process.is_alive() and time.monotonic() < end, (self.out, self.err)
            time.sleep(0.01)

    def send(self, number: int, group: bool = False) -> None:
        """A signal, to all of its group if asked to."""
        assert self.process.pid is not None
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit code; -n where signal n has killed it."""
        self.process.join(seconds)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        assert not late, f"not done after {seconds} seconds: {self.out} {self.err}"
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()


def notes(error: BaseException) -> str:
    """What was attached to an error."""
    return "; ".join(getattr(error, "__notes__", []))


def alive(pid: int) -> bool:
    """Whether a process is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def two_processes(work: Callable[[int], Any], number: int = 2) -> list[Apart]:
    """Starts `work(rank)` in each of two processes (or of another number) that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def in_process(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ["LOCAL_WORLD_SIZE"] = str(number)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        work(rank)

    return [Apart(partial(in_process, rank)) for rank in range(number)]


def launched(work: Callable[[], Any], processes: int = 2) -> Apart:
    """Starts torchrun's agent in a copy of this process, with workers that are copies as well: none imports torch."""

    def agent() -> None:
        config = LaunchConfig(
            *(1, 1, processes),
            run_id=f"test-{time.monotonic_ns()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            max_restarts=0,
            monitor_interval=0.1,
        )
        elastic_launch(config, _as_program)(work)

    return Apart(agent, group=True)


def _as_program(work: Callable[[], Any]) -> None:
    """Ends as Python would at the end of a program."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # The agent's own came along.
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        last_words.watch_processes()
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    distributed.destroy()
    if code:
        # The agent waits for what comes back of the others.
        os._exit(code)

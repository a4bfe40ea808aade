"""Contenders that take turns block by block, each in a process of its own, in which the loop by hand runs, too."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from contenders import Contender
from environments import python_of

HERE = Path(__file__).parent
# Nobody needs longer for a block, or to start.
PATIENCE = 300.0
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TERM": "xterm-256color"}
# Nothing is written beside the code: cookiecutter copies whatever lies in the template folder.
ALONE["PYTHONPYCACHEPREFIX"] = str(HERE.parent / ".cache" / "pycache")
# Nobody is to compile libraries in every start.
ALONE["PYTHONDONTWRITEBYTECODE"] = ""


class Lap(NamedTuple):
    """What a block has cost, in seconds, and the block by hand in the same process.

    Attributes:
        cpu: CPU time of all threads.
        wall: Time on the wall.
        hand_cpu: The same of the loop written by hand.
        hand_wall: The same of the loop written by hand.
    """

    cpu: float
    wall: float
    hand_cpu: float
    hand_wall: float

    def ratio(self, clock: str) -> float:
        """How many times as long as by hand; by "cpu" or "wall"."""
        return getattr(self, clock) / getattr(self, f"hand_{clock}")  # type: ignore[no-any-return]


class Racer:
    """A process with a contender. While it waits for its turn it is stopped, with its threads.

    Its terminal is a pseudo-terminal, so that bars are drawn as they are before a user.

    Args:
        contender: Who races.
        words: Further words of `contender.py`'s command line.
    """

    def __init__(self, contender: Contender, kind: str, words: Sequence[str]) -> None:
        self.name, self.laps, self.end = contender.name, list[Lap](), dict[str, Any]()
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        self._line = ours.makefile("rw", encoding="utf-8")
        self._terminal, inside = pty.openpty()
        script = [str(python_of(contender.environment)), str(HERE / "contender.py"), kind, contender.module]
        words = ["--variant", contender.variant, "--folder", str(self.folder), *words]
        self._process = subprocess.Popen(
            [*script, "--descriptor", str(theirs.fileno()), *words],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=inside,
            stderr=inside,
            cwd=self.folder,
            env={**os.environ, **ALONE},
            start_new_session=True,
        )
        os.close(inside)
        theirs.close()
        ours.close()
        self._said = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run_block(self) -> None:
        """Give it a turn."""
        self._signal(signal.SIGCONT)
        self._line.write("go\n")
        self._line.flush()
        self.laps.append(Lap(**self._answer()))

    def finish(self) -> None:
        """Let it come to its end, after the last block."""
        self._signal(signal.SIGCONT)
        self._line.write("go\n")
        self._line.flush()
        self.end = self._answer()["end"]
        self._process.wait(PATIENCE)

    def __enter__(self) -> Racer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and let go of everything that was opened for it."""
        self._kill()
        self._listener.join(10)
        os.close(self._terminal)
        # Of a line that could not be sent, nothing is left to be said.
        with contextlib.suppress(OSError):
            self._line.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._line.readline()
        except TimeoutError:
            line = ""
        if not line:
            self._kill()
            self._listener.join(10)
            said = self._said.decode(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name}: ended, or did nothing for {PATIENCE:.0f} s; it said:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        if "end" not in answer:
            self._signal(signal.SIGSTOP)
        return answer

    def _listen(self) -> None:
        """Read its terminal, as somebody who looks at it."""
        with contextlib.suppress(OSError):
            while text := os.read(self._terminal, 65536):
                self._said = (self._said + text)[-10000:]

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextlib.contextmanager
def racers(entries: Sequence[tuple[Contender, Sequence[str]]], kind: str) -> Iterator[list[Racer]]:
    """Start contenders, each with further words of its command line, one after the other."""
    # Whoever is stopped outlives its driver, unless this takes care of it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Racer(contender, kind, words)) for contender, words in entries]


def race(racing: Sequence[Racer], blocks: int, orders: random.Random) -> None:
    """Let them take turns, in another order in each round; the first block of each is for warming up."""
    for _ in range(blocks):
        for racer in orders.sample(racing, len(racing)):
            racer.run_block()
    for racer in racing:
        racer.finish()
        racer.laps.pop(0)
    print(f"  raced: {', '.join(racer.name for racer in racing)}", file=sys.stderr, flush=True)


def race_anew(
    entries: Sequence[tuple[Contender, Sequence[str]]],
    kind: str,
    rounds: int,
    launches: int,
    check: Callable[[Sequence[Racer]], None],
) -> list[Racer]:
    """Race several times over, with processes that are started anew.

    Where the memory of a process lies makes it faster or slower for as long as it lives. The loop by hand, which runs
    in the same one, is so, too; what is left of such luck differs from launch to launch.

    Args:
        entries: Who races, with which words.
        kind: What `contender.py` does.
        rounds: Rounds of each launch, beside the one to warm up.
        launches: How often all are started.
        check: Looks at all of them at the end of each launch, while their files are there.

    Returns:
        The contenders of the last launch, which are over, with the laps of all launches; in the order of the entries,
        though each launch starts them in another one.
    """
    laps: dict[str, list[Lap]] = {}
    names, orders = [contender.name for contender, _ in entries], random.Random(0)
    for _ in range(launches):
        with racers(orders.sample(entries, len(entries)), kind) as started:
            racing = sorted(started, key=lambda racer: names.index(racer.name))
            race(racing, rounds + 1, orders)
            check(racing)
        for racer in racing:
            racer.laps = laps[racer.name] = [*laps.get(racer.name, []), *racer.laps]
    return racing

"""Contenders in processes of their own, which take turns: so each is measured at nearly the same time as the others."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peers import python_of

HERE = Path(__file__).parent
# Name, file in `contenders/`, environment (None: ours), and whether it is Lightning's barebones.
CONTENDERS: dict[str, tuple[str, str | None, bool]] = {
    "by hand": ("bare", None, False),
    "engine (this template)": ("ours", None, False),
    "Fabric": ("fabric", "lightning", False),
    "Ignite": ("ignite", "ignite", False),
    "Accelerate": ("accelerate", "accelerate", False),
    "Lightning, barebones": ("lightning", "lightning", True),
    "Hugging Face Trainer": ("huggingface", "huggingface", False),
    "Lightning": ("lightning", "lightning", False),
}
BY_HAND, OURS = list(CONTENDERS)[:2]


class Contender:
    """A process that trains when it is its turn.

    Args:
        name: A key of `CONTENDERS`.
        program: The file in this folder that it runs.
        settings: What the program is told beside its name.

    Raises:
        RuntimeError: It ended before its time; the message has the end of what it printed.
    """

    def __init__(self, name: str, program: str, folder: str, **settings: Any) -> None:
        loop, peer, barebones = CONTENDERS[name]
        self.name, self._printed = name, bytearray()
        told = {"loop": loop, "barebones": barebones, "folder": folder, **settings}
        python = sys.executable if peer is None else str(python_of(peer))
        (read, self._turn), (self._answer, write) = os.pipe(), os.pipe()
        # A terminal, so that bars are drawn as a user would see them.
        self._terminal, terminal = pty.openpty()
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(told), str(read), str(write)],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, **offline, "TERM": "xterm-256color", "COLUMNS": "120"},
            cwd=folder,
        )
        for end in (read, write, terminal):
            os.close(end)
        threading.Thread(target=self._drain, daemon=True).start()
        self._answers = os.fdopen(self._answer)

    def turn(self) -> dict[str, Any]:
        """Let it run a block; returns what it tells of it."""
        os.write(self._turn, b"go\n")
        return self.told()

    def told(self) -> dict[str, Any]:
        """Its next answer."""
        line = self._answers.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} ended: ...{self._printed.decode(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        os.close(self._turn)
        self.process.kill()
        self.process.wait()

    def _drain(self) -> None:
        # A terminal whose last process has gone reads as an error.
        with suppress(OSError):
            while chunk := os.read(self._terminal, 65536):
                self._printed += chunk
                del self._printed[:-20000]


@contextmanager
def contenders(names: list[str], program: str, **settings: Any) -> Iterator[list[Contender]]:
    """Start contenders, and end them all."""
    with tempfile.TemporaryDirectory() as folder:
        started: list[Contender] = []
        try:
            for name in names:
                own = Path(folder, name.replace(",", ""))
                own.mkdir()
                started.append(Contender(name, program, str(own), **settings))
            yield started
        finally:
            for contender in started:
                contender.close()


def check_same_work(results: dict[str, float], tolerance: float = 1e-4) -> None:
    """Refuse a race in which somebody has not done what the loop written by hand has done.

    Args:
        results: A figure of the trained net, by contender.
        tolerance: Largest difference, as a share.

    Raises:
        RuntimeError: A contender has another result.
    """
    expected = results[BY_HAND]
    for name, found in results.items():
        if abs(found - expected) > tolerance * abs(expected):
            raise RuntimeError(f"{name} has trained something else: {found:.6f}, by hand it is {expected:.6f}")

"""One contender: a process that trains by blocks of steps, whenever the driver (`race.py`) gives it its turn."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

from contenders.task import Task
from model.standard_net import StandardNet

HERE = str(Path(__file__).parent)
# Steps after the first in which calls are counted.
QUIET_STEPS, COUNTED = 60, 30


def tiny() -> nn.Module:
    """A net whose step is nearly all overhead: the worst case."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def standard() -> nn.Module:
    """The net that a generated project starts with, without what draws at random: so all contenders must agree."""
    return StandardNet(10, (1, 8, 8), dropout=0.0)


NETS = {"tiny": tiny, "standard_net": standard}


@dataclass
class Turns:
    """Tells the driver what each block has taken, and waits for the next turn.

    Attributes:
        block: Steps of a block.
        read: Where turns are given.
        write: Where they are answered.
        count: Count calls and frames, rather than time.
    """

    block: int
    read: Any
    write: Any
    count: bool
    steps: int = 0
    calls: int = 0
    frames: int = 0
    begun: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """To be called first in each step; blocks lie between two such calls, and so hold whole rounds of a loop."""
        if self.count:
            self._count()
        elif self.steps % self.block == 0:
            if self.begun:
                cpu, wall = (now - then for now, then in zip(_clocks(), self.begun, strict=True))
                self.tell({"cpu": cpu, "wall": wall})
            self.read.readline()
            self.begun = _clocks()
        self.steps += 1

    def tell(self, what: dict[str, Any]) -> None:
        """Answer the driver."""
        self.write.write(json.dumps(what) + "\n")
        self.write.flush()

    def _count(self) -> None:
        if self.steps == QUIET_STEPS:
            frame, self.frames = sys._getframe(2), 0
            while not (frame.f_code.co_name == "run" and frame.f_code.co_filename.startswith(HERE)):
                self.frames += not frame.f_code.co_filename.startswith(HERE)
                assert frame.f_back is not None
                frame = frame.f_back
            sys.setprofile(self._called)
        elif self.steps == QUIET_STEPS + COUNTED:
            sys.setprofile(None)

    def _called(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event == "call"


def _clocks() -> list[float]:
    return [time.process_time(), time.perf_counter()]


def main() -> None:
    """Train as asked, and tell what came out."""
    given = json.loads(sys.argv[1])
    read, write = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[2:], "rw", strict=True))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    turns = Turns(given["block"], read, write, given["count"])
    torch.manual_seed(0)
    net = NETS[given["net"]]()
    batches = [(torch.randn(64, 1, 8, 8), torch.randint(10, (64,))) for _ in range(given["block"])]
    task = Task(
        net=net,
        # Without workers, and without making batches: what is left is the loop.
        batches=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        val=None,
        epochs=given["epochs"],
        logs=given["logs"],
        barebones=given["barebones"],
        folder=given["folder"],
        tick=turns.tick,
    )
    importlib.import_module(f"contenders.{given['loop']}").run(task)
    norm = float(sum(parameter.detach().double().pow(2).sum() for parameter in net.parameters()))
    turns.tell({"norm": norm, "steps": turns.steps, "calls": turns.calls / COUNTED, "frames": turns.frames})


if __name__ == "__main__":
    main()

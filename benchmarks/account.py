"""Where the microseconds go that a step takes under this Trainer, and by hand does not: function by function.

Both train the tiny net on the same batches in memory, under Python's profiler. It makes each call of Python more
expensive, so that times are upper limits; calls are exact. Functions of torch that both run alike are left out.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from contenders.ours import QUIET, Training
from tables import Table, record
from work import TASKS, digits, make_work

ENGINE = str(Path(engine.__file__).parent)
TASK = TASKS["tiny"]
# What the functions of the engine are for, by the name of the function; others are counted together.
PURPOSES = {
    "train_batches": "loop",
    "train_batch": "loop",
    "epoch": "reading: number, position, and whether it is the last",
    "_converted": "reading: the sample",
    "set_epoch": "reading: number, position, and whether it is the last",
    "to_device": "transfer: is it there already?",
    "move_to_device": "transfer: is it there already?",
    "begin_batch": "log: where values belong",
    "forward_backward": "step: forward and backward pass, zero_grad between them",
    "_split_output": "step: what training_step returned is checked",
    "backward": "step: forward and backward pass, zero_grad between them",
    "watch_loss": "loss: is it finite?",
    "end_batch": "hooks, schedulers, logs",
    "finish_step": "hooks, schedulers, logs",
    "call_monitoring": "hooks, schedulers, logs",
    "leaves_epoch": "stop, signal, validation: is one due?",
    "interrupted": "stop, signal, validation: is one due?",
    "agreed": "stop, signal, validation: is one due?",
}


class Profiled:
    """A profile of the steps between two numbers.

    Args:
        first: Step before which it starts.
        steps: How many.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps, self.seen = first, steps, 0
        self.profile = cProfile.Profile(time.thread_time)

    def watch(self, net: torch.nn.Module) -> None:
        """Count steps within the net."""
        forward = net.forward

        def watched(images: torch.Tensor) -> Any:
            if self.seen == self.first:
                self.profile.enable()
            elif self.seen == self.first + self.steps:
                self.profile.disable()
            self.seen += 1
            return forward(images)

        net.forward = watched

    def functions(self) -> Iterator[tuple[str, str, float, float]]:
        """File, name, calls a step, and microseconds a step without what it calls."""
        for (file, _, name), (_, calls, own, *_) in pstats.Stats(self.profile).stats.items():  # type: ignore[attr-defined]
            yield file, name, calls / self.steps, own / self.steps * 1e6


def profile(train: Callable[[Any], None], steps: int) -> Profiled:
    """Profile the steps of a loop, after some to warm up."""
    profiled = Profiled(100, steps)
    loader = DataLoader(digits(50) * (steps // 50 + 4), batch_size=None)  # type: ignore[arg-type]
    work = make_work(TASK, loader, Path.cwd())
    profiled.watch(work.net)
    train(work)
    return profiled


def by_hand(work: Any) -> None:
    """The plainest loop."""
    optimizer = work.optimizer(work.net.parameters())
    for images, labels in work.batches:
        loss = torch.nn.functional.cross_entropy(work.net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def by_trainer(work: Any) -> None:
    """This Trainer, quietly."""
    engine.Trainer(accelerator="cpu", max_epochs=1, **QUIET).fit(Training(work), work.batches)


def main() -> None:
    """Profile both, and print what the engine did in a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="[2000]")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hand, ours = profile(by_hand, steps), profile(by_trainer, steps)
    whole = sum(own for *_, own in hand.functions())
    spent: dict[str, list[float]] = {}
    for file, name, calls, own in ours.functions():
        if file.startswith(ENGINE) and calls >= 0.5:
            row = spent.setdefault(PURPOSES.get(name, "other functions"), [0.0, 0.0])
            row[0] += calls
            row[1] += own
    note = f"A step by hand takes {whole:,.0f} µs under the profiler. Self time, {steps:,} steps of tiny, quiet."
    table = Table("what the engine does in a step", "for", note, "account")
    for purpose, (calls, own) in sorted(spent.items(), key=lambda item: -item[1][1]):
        table.add(purpose, {"calls": f"{calls:.0f}", "µs": f"{own:.1f}", "of a step by hand": f"{own / whole:.1%}"})
    total = [sum(column) for column in zip(*spent.values(), strict=True)]
    table.add(
        "all", {"calls": f"{total[0]:.0f}", "µs": f"{total[1]:.1f}", "of a step by hand": f"{total[1] / whole:.1%}"}
    )
    record("account", [table])


if __name__ == "__main__":
    main()

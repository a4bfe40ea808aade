"""Where the microseconds go that a step takes under this Trainer, and by hand does not: function by function.

Both train the tiny net on the same batches in memory, under Python's profiler. It makes each call of Python more
expensive, so that times are upper limits; calls are exact. Functions that both call equally often are left out. What
the loop by hand calls more often than this Trainer has rows of its own, with numbers below zero.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from contenders.ours import QUIET, Training
from tables import Table, record
from work import TASKS, digits, make_work

ENGINE, HERE = str(Path(engine.__file__).parent), str(Path(__file__).parent)
PROFILER = "by hand: all of these tell torch's profiler of themselves"
# Files of torch, and what the loop by hand enters them for.
BY_HAND = {
    "torch/utils/data/": "by hand: the iterator of torch's DataLoader",
    "torch/optim/": "by hand: zero_grad, and what is around the optimizer's step",
    "torch/autograd/profiler": PROFILER,
    "torch/_ops": PROFILER,
}
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
    "step_unrecorded": "step: what is around the optimizer's",
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

    def functions(self) -> dict[tuple[str, int, str], tuple[float, float]]:
        """Calls a step, and microseconds a step without what it calls, by file, line and name."""
        stats = pstats.Stats(self.profile).stats.items()  # type: ignore[attr-defined]
        return {key: (calls / self.steps, own / self.steps * 1e6) for key, (_, calls, own, *_) in stats}


def profile(train: Callable[[Any], None], steps: int) -> Profiled:
    """Profile the steps of a loop, after some to warm up."""
    profiled = Profiled(100, steps)
    loader = DataLoader(digits(50) * (steps // 50 + 4), batch_size=None)  # type: ignore[arg-type]
    work = make_work(TASK, loader, Path.cwd())
    profiled.watch(work.net)
    train(work)
    return profiled


def purpose_of(file: str, name: str, more: bool) -> str:
    """What a function is for that the engine calls `more` often than the loop by hand, or less often.

    Empty if it belongs to the loops that are compared.
    """
    if file.startswith(HERE):
        return ""
    if file.startswith(ENGINE):
        return PURPOSES.get(name, "other functions")
    if file == "~":
        return "built-in functions, such as isinstance and item" if more else "by hand: built-in functions"
    if more:
        return "other functions of torch"
    whole = Path(file).as_posix()
    return next((purpose for part, purpose in BY_HAND.items() if part in whole), "by hand: other functions of torch")


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
    hand, ours = profile(by_hand, steps).functions(), profile(by_trainer, steps).functions()
    whole = sum(own for _, own in hand.values())
    spent: dict[str, list[float]] = {}
    for key in ours.keys() | hand.keys():
        (calls, own), (calls_by_hand, own_by_hand) = ours.get(key, (0.0, 0.0)), hand.get(key, (0.0, 0.0))
        purpose = purpose_of(key[0], key[2], more=calls > calls_by_hand)
        if abs(calls - calls_by_hand) >= 0.5 and purpose:
            row = spent.setdefault(purpose, [0.0, 0.0])
            row[0] += calls - calls_by_hand
            row[1] += own - own_by_hand
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

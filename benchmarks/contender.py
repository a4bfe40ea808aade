"""A process in which one contender does its work, block by block, whenever it is told to.

Before each block the loop written by hand does one of its own, in the same process, with a net of its own: what makes
a process slow for as long as it lives, such as where its memory lies, makes both slow. `turns.py` starts it, and talks
to it over a socket.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import work
from contenders import bare
from torch.optim.optimizer import register_optimizer_step_post_hook


class Turn:
    """The contender's end of the line.

    Args:
        descriptor: The socket.
        blocks: How many blocks there are.
        counted: Number of the block of which Python calls are counted instead of time; None to count none.

    Attributes:
        by_hand: Does a block of the loop written by hand.
        warm_up: Does a little of the same, on another net, since caches are cold when a process goes on.
        whose: "hand_" while one of them runs, otherwise empty.
    """

    def __init__(self, descriptor: int, blocks: int, counted: int | None = None) -> None:
        self.line = socket.socket(fileno=descriptor).makefile("rw", encoding="utf-8")
        self.total, self.block, self.counted = blocks, -1, counted
        self.counter = CallCounter()
        self.whose, self.hand = "", (0.0, 0.0)
        self.by_hand: Callable[[], Any] = lambda: None
        self.warm_up: Callable[[], Any] = lambda: None
        self.begin = time.process_time(), time.perf_counter()

    def border(self) -> None:
        """Tell what the block that is over has cost, wait for the next turn, and do a block by hand."""
        sys.setprofile(None)
        # CPU time is of all threads, so that what a contender does behind its loop's back counts, too: also while the
        # loop by hand runs, which has one thread, and while this one talks to the driver.
        now = time.process_time(), time.perf_counter()
        cost = {"cpu": now[0] - self.begin[0], "wall": now[1] - self.begin[1]}
        self.tell({**cost, "hand_cpu": self.hand[0], "hand_wall": self.hand[1]})
        if not self.line.readline():
            os._exit(1)  # nobody is there any more
        self.block += 1
        spent = 0.0
        if self.block < self.total:
            with torch.enable_grad():
                spent = self._run_by_hand()
        self.begin = now[0] + spent, time.perf_counter()
        if self.block == self.counted:
            sys.setprofile(self.counter)

    def _run_by_hand(self) -> float:
        """Do a block by hand, and note what it has cost; returns the CPU time of all that, in this thread."""
        self.whose, start = "hand_", time.thread_time()
        self.warm_up()
        begin = time.thread_time(), time.perf_counter()
        self.by_hand()
        end = time.thread_time(), time.perf_counter()
        self.whose, self.hand = "", (end[0] - begin[0], end[1] - begin[1])
        return end[0] - start

    def tell(self, what: dict[str, Any]) -> None:
        """Send a line."""
        self.line.write(json.dumps(what) + "\n")
        self.line.flush()


class CallCounter:
    """Counts Python calls, and the frames between where a contender enters a library and where that enters its step.

    Attributes:
        calls: Python functions that were called.
        frames: Frames of libraries above the code that computes the loss; 0 where the loop is the user's own.
    """

    def __init__(self) -> None:
        self.calls, self.frames = 0, 0
        self.loss = torch.nn.functional.cross_entropy.__code__
        self.own = str(Path(__file__).with_name("contenders"))

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """For sys.setprofile."""
        if event == "call":
            self.calls += 1
            if frame.f_code is self.loss:
                self.frames = self._between(frame.f_back)

    def _between(self, frame: FrameType | None) -> int:
        """Frames that lie between the contender's own, apart from those by which torch calls a module."""
        seen = 0
        while frame is not None and not (frame.f_code.co_name == "train" and self._is_own(frame)):
            seen += not self._is_own(frame) and frame.f_code.co_filename != torch.nn.modules.module.__file__
            frame = frame.f_back
        return seen

    def _is_own(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(self.own)


def steps(module: Any, options: argparse.Namespace, turn: Turn) -> dict[str, Any]:
    """Train on batches in memory."""
    task = work.TASKS[options.task]
    size, ready = options.steps, work.digits(options.steps)
    batches = work.Blocks(ready, options.blocks, turn.border)
    # Where calls are counted, no block has a checkpoint.
    save_every = size if options.counted is None else len(batches.loader) + 1
    chosen = work.make_work(task, batches.loader, options.folder, options.realistic, save_every, options.variant)
    batches.watch(chosen.net)
    hand, spare = ByHand(task, options.folder), ByHand(task, options.folder)
    turn.by_hand = functools.partial(hand.train, work.in_memory(ready))
    turn.warm_up = functools.partial(spare.train, work.in_memory(ready[: max(1, size // 10)]))
    module.train(chosen)
    sys.setprofile(None)
    # The contender has had one batch more.
    hand.train(ready[:1])
    torch.save([flat(chosen.net), flat(hand.net)], options.folder / "weights.pt")
    return {"calls": turn.counter.calls / size, "frames": turn.counter.frames}


class ByHand:
    """A net that the loop written by hand trains, with its optimizer."""

    def __init__(self, task: work.Task, folder: Path) -> None:
        self.net = work.make_work(task, (), folder).net
        self.optimizer = task.optimizer(self.net.parameters())

    def train(self, batches: Iterable[work.Batch]) -> None:
        """Do a step for each batch."""
        bare.steps(self.net, self.optimizer, batches)


def flat(net: torch.nn.Module) -> torch.Tensor:
    """All weights, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def train_epochs(module: Any, options: argparse.Namespace, turn: Turn) -> dict[str, Any]:
    """Train and validate; an epoch is a block."""
    import epochs
    from model.standard_net import StandardNet

    done = watch(StandardNet, turn)
    what = (options.task, options.blocks, options.folder)
    task = epochs.make_epochs(*what, turn.border, options.samples, options.variant)
    other = epochs.make_epochs(*what, lambda: None, options.samples)
    turn.by_hand = functools.partial(next, bare.each_epoch(other))
    accuracy = module.epochs(task)
    turn.border()
    return {**done, "accuracy": accuracy}


def watch(net: type[torch.nn.Module], turn: Turn) -> Counter[str]:
    """Count optimizer steps, and samples that nets of a class see in training and in evaluation; by hand apart."""
    done: Counter[str] = Counter()
    forward = net.forward

    def count_samples(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        done[turn.whose + ("trained" if self.training else "validated")] += len(images)
        return forward(self, images)

    def count_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A project tries its optimizer on a parameter of its own.
        done[turn.whose + "steps"] += sum(len(group["params"]) for group in optimizer.param_groups) > 1

    net.forward = count_samples
    register_optimizer_step_post_hook(count_steps)
    return done


def until_first_step(module: str, variant: str) -> None:
    """Train as if for long; whoever measures the start ends the process at the first step."""
    torch.set_num_threads(1)
    batches = work.Blocks(work.digits(4), 1, lambda: None)
    chosen = work.make_work(work.TASKS["standard_net"], batches.loader, Path.cwd(), variant=variant)
    importlib.import_module(module).train(chosen)


KINDS: dict[str, Callable[[Any, argparse.Namespace, Turn], dict[str, Any]]] = {"steps": steps, "epochs": train_epochs}


def main() -> None:
    """Do what the driver asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("module")
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--task", default="tiny")
    parser.add_argument("--variant", default="")
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--counted", type=int)
    parser.add_argument("--samples", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    turn = Turn(options.descriptor, options.blocks, options.counted)
    end = KINDS[options.kind](importlib.import_module(options.module), options, turn)
    turn.tell({"end": end})


if __name__ == "__main__":
    main()

"""A process in which one contender does its work, block by block, whenever it is told to.

Within each block it takes turns with the loop written by hand, every few steps, in the same process: what makes a
process slow for as long as it lives, such as where its memory lies, makes both slow, and so does what slows the machine
for a second. That loop has a net of its own, and has done as many steps at the end of each block. `turns.py`
starts a contender, and talks to it over a socket.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import socket
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import work
from contenders import bare

# Batches by hand before an epoch goes on, since caches are cold then.
WARM_UP = 8


class Turn:
    """The contender's end of the line.

    Args:
        descriptor: The socket.
        blocks: How many blocks there are.
        counted: Number of the block of which Python calls are counted instead of time; None to count none.

    Attributes:
        by_hand: Does the next piece of a block of the loop written by hand.
        rest_by_hand: Does what is left of it.
        warm_up: Does a little of the same, on another net, since caches are cold when a process goes on.
        whose: "hand_" or "spare_" while one of them runs, otherwise empty.
    """

    def __init__(self, descriptor: int, blocks: int, counted: int | None = None) -> None:
        self.line = socket.socket(fileno=descriptor).makefile("rw", encoding="utf-8")
        self.total, self.block, self.counted = blocks, -1, counted
        self.counter = CallCounter()
        self.by_hand: Callable[[], Any] = lambda: None
        self.rest_by_hand = self.warm_up = self.by_hand
        self.whose, self.spent = "", dict.fromkeys(("aside_cpu", "aside_wall", "hand_cpu", "hand_wall"), 0.0)
        self.begin = time.process_time(), time.perf_counter()

    def border(self) -> None:
        """Tell what the block that is over has cost, wait for the next turn, and do the first piece by hand."""
        sys.setprofile(None)
        self._aside(self.rest_by_hand, "hand_")
        # CPU time is of all threads, so that what a contender does behind its loop's back counts, too: also while the
        # loop by hand runs, which has one thread, and while this one talks to the driver.
        now, spent = (time.process_time(), time.perf_counter()), self.spent
        cost = {
            "cpu": now[0] - self.begin[0] - spent["aside_cpu"],
            "wall": now[1] - self.begin[1] - spent["aside_wall"],
        }
        self.tell({**cost, "hand_cpu": spent["hand_cpu"], "hand_wall": spent["hand_wall"]})
        if not self.line.readline():
            os._exit(1)  # nobody is there any more
        self.begin, self.spent = (now[0], time.perf_counter()), dict.fromkeys(spent, 0.0)
        self.block += 1
        if self.block < self.total:
            self._aside(self.warm_up, "")
            self.between()

    def between(self) -> None:
        """Do a piece by hand, within a block."""
        sys.setprofile(None)
        self._aside(self.by_hand, "hand_")
        if self.block == self.counted:
            sys.setprofile(self.counter)

    def _aside(self, work: Callable[[], Any], counts_for: str) -> None:
        """Work that is not the contender's, and note what it has cost; "hand_" if it counts for the loop by hand."""
        begin = time.thread_time(), time.perf_counter()
        # A contender may validate just now.
        with torch.inference_mode(False), torch.enable_grad():
            self.whose, start = "hand_", (time.thread_time(), time.perf_counter())
            work()
            self.whose, end = "", (time.thread_time(), time.perf_counter())
        for number, (clock, now) in enumerate({"cpu": time.thread_time(), "wall": time.perf_counter()}.items()):
            self.spent[f"aside_{clock}"] += now - begin[number]
            if counts_for:
                self.spent[f"hand_{clock}"] += end[number] - start[number]

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
    piece, rest = divmod(size, options.pieces)
    if rest:
        raise ValueError(f"{size} steps do not make {options.pieces} pieces of equal size")
    pieces = itertools.cycle([turn.border] + [turn.between] * (options.pieces - 1))
    batches = work.Blocks(ready, options.blocks, lambda: next(pieces)(), piece)
    # Where calls are counted, no block has a checkpoint.
    save_every = size if options.counted is None else len(batches.loader) + 1
    chosen = work.make_work(task, batches.loader, options.folder, options.realistic, save_every, options.variant)
    batches.watch(chosen.net)
    hand, spare = ByHand(task, options.folder), ByHand(task, options.folder)
    # One more than the blocks have, as the contender has.
    by_hand = iter(work.in_memory([*ready * options.blocks, ready[0]]))
    turn.by_hand = lambda: hand.train(itertools.islice(by_hand, piece))
    turn.warm_up = functools.partial(spare.train, work.in_memory(ready[: max(1, size // 10)]))
    module.train(chosen)
    sys.setprofile(None)
    hand.train(by_hand)
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
    other, spare = (epochs.make_epochs(*what, lambda: None, options.samples) for _ in range(2))
    hand, cold = EpochsByHand(bare.each_batch(other)), EpochsByHand(bare.each_batch(spare))
    turn.by_hand, turn.rest_by_hand = hand.step, hand.rest

    def warm_up() -> None:
        turn.whose = "spare_"
        for _ in range(WARM_UP):
            cold.begin()
            cold.step()
        hand.begin()

    turn.warm_up = warm_up
    accuracy = module.epochs(task)
    turn.border()
    return {**done, "accuracy": accuracy}


class EpochsByHand:
    """The loop by hand, batch by batch: it stops when one has been read, and at the end of an epoch until `begin`."""

    def __init__(self, batches: Iterator[float | None]) -> None:
        self.batches, self.over = batches, True

    def begin(self) -> None:
        """Let the next epoch begin."""
        self.over = False

    def step(self) -> None:
        """Train or validate on the batch that was read last, and read the next one, if there is one left."""
        # An accuracy comes after the last one.
        self.over = self.over or next(self.batches) is not None

    def rest(self) -> None:
        """Do all that are left of it."""
        while not self.over:
            self.step()


def watch(net: type[torch.nn.Module], turn: Turn) -> Counter[str]:
    """Count optimizer steps, and samples that nets of a class see in training and in evaluation; by hand apart.

    The labels that are trained on make a number, "order": another one if classes come in another order, or if batches
    have other sizes. Before each batch of the contender, once it is read, it is the turn of the loop by hand.
    """
    done: Counter[str] = Counter()
    first: dict[str, torch.Tensor] = {}
    # Where the optimizer of the races changes weights. A hook would be a cost that nobody has who trains.
    adam: Any = importlib.import_module("torch.optim.adam")
    forward, cross_entropy, step = net.forward, torch.nn.functional.cross_entropy, adam.adam

    def count_samples(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        if not turn.whose:
            turn.between()
        done[turn.whose + ("trained" if self.training else "validated")] += len(images)
        return forward(self, images)

    def note_order(input: torch.Tensor, target: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:  # noqa: A002
        if input.requires_grad:
            name = turn.whose + "order"
            done[name] = zlib.crc32(f"{target.tolist()}".encode(), done[name])
        return cross_entropy(input, target, *args, **options)

    def count_steps(params: list[torch.Tensor], *args: Any, **options: Any) -> None:
        # A project tries its optimizer on a parameter of its own, and has two groups of parameters.
        if len(params) > 1:
            done[turn.whose + "steps"] += params[0] is first.setdefault(turn.whose, params[0])
        step(params, *args, **options)

    net.forward, torch.nn.functional.cross_entropy, adam.adam = count_samples, note_order, count_steps
    return done


def until_first_step(module: str, variant: str) -> None:
    """Train as if for long; whoever measures the start ends the process at the first step."""
    torch.set_num_threads(1)
    batches = work.Blocks(work.digits(4), 1, lambda: None, size=4)
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
    parser.add_argument("--pieces", type=int, default=1)
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

"""How the cost of this Trainer grows with what a run has more of, beside a loop written by hand that does the same.

Both run in one process and take turns. What is printed is CPU time of a step, and what the Trainer adds to it. At the
end stands what 10,000 steps leave behind in memory.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from alternating import Alternation
from engine.loggers import CSVLogger
from tables import Goal, Table, ratio_cells, record
from work import Batch, in_memory, sgd, tiny

QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LOG_EVERY = 50


class Nothing(engine.Callback):
    """A callback that overrides no hook."""


class Training(engine.Module):
    """A classification that logs some values of each step, and validates on some sets."""

    def __init__(self, net: nn.Module, turns: Alternation, names: list[str]) -> None:
        super().__init__()
        self.net, self.turns, self.names = net, turns, names

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        self.turns.tick()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for name in self.names:
            self.log(name, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss of a validation batch."""
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The cheapest."""
        return sgd(self.parameters())


class ByHand:
    """The plainest loop that does the same, a block at a time: a step for each batch, then validation.

    Args:
        net: What to train.
        batches: A block of batches.
        sets: Batches of each validation set, whose loss is averaged.
        names: Values that are kept in each step, and written in every `LOG_EVERY`th.
        file: Where to.
    """

    def __init__(
        self, net: nn.Module, batches: list[Batch], sets: list[list[Batch]], names: list[str], file: TextIO
    ) -> None:
        self.net, self.optimizer, self.names, self.steps = net, sgd(net.parameters()), names, 0
        self.loader, self.sets = in_memory(batches), [in_memory(held_out) for held_out in sets]
        self.writer = csv.writer(file)

    def block(self) -> None:
        """Train, and validate if there is a set."""
        for images, labels in self.loader:
            loss = nn.functional.cross_entropy(self.net(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            if self.names:
                self.log(loss)
        if self.sets:
            self.net.eval()
            with torch.no_grad():
                self.losses = [self.validate(loader) for loader in self.sets]
            self.net.train()

    def log(self, loss: Tensor) -> None:
        """Keep the values of a step, and write them if they are due."""
        values = {name: loss.item() for name in self.names}
        if self.steps % LOG_EVERY == 0:
            self.writer.writerow([self.steps, *values.values()])

    def validate(self, loader: Any) -> float:
        """The loss of a set."""
        total, samples = torch.zeros(()), 0
        for images, labels in loader:
            total += nn.functional.cross_entropy(self.net(images), labels) * len(labels)
            samples += len(labels)
        return total.item() / samples


def names_of(values: int) -> list[str]:
    """Names of so many values that are logged."""
    return [f"value_{number}" for number in range(values)]


def batches_of(size: int, steps: int) -> list[Batch]:
    """Random batches."""
    return [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for _ in range(steps)]


def race(
    rounds: int,
    steps: int,
    net: Callable[[], nn.Module] = tiny,
    size: int = 64,
    callbacks: int = 0,
    values: int = 0,
    sets: int = 0,
    per_epoch: int | None = None,
) -> list[tuple[float, float]]:
    """CPU seconds of each block, under the Trainer and by hand.

    Args:
        rounds: Blocks that are measured.
        steps: Steps of a block.
        net: Makes the net.
        size: Samples of a batch.
        callbacks: Callbacks that override nothing.
        values: Values that are logged in each step, and written in every `LOG_EVERY`th.
        sets: Validation sets, each of as many batches as a block, whose loss is averaged.
        per_epoch: Blocks of an epoch; default: all in one.
    """
    torch.manual_seed(0)
    batches = batches_of(size, steps)
    held_out = [batches_of(size, steps) for _ in range(sets)]
    blocks = 1 if sets else per_epoch or rounds + 2
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "by_hand.csv"), "w", newline="") as file:
        names = names_of(values)
        turns = Alternation(ByHand(net(), batches, held_out, names, file).block, steps)
        trainer = engine.Trainer(
            accelerator="cpu",
            logger=CSVLogger(folder) if values else False,
            log_every_n_steps=LOG_EVERY,
            callbacks=[Nothing() for _ in range(callbacks)],
            max_epochs=(rounds + 2) // blocks,
            num_sanity_val_steps=0,
            **QUIET,
        )
        val = [in_memory(batches) for batches in held_out] or None
        trainer.fit(Training(net(), turns, names), in_memory(batches * blocks), val)
    # The first block warms up, and the last has no border behind it.
    return turns.laps[1:]


def many(parameters: int) -> nn.Module:
    """A net with so many small parameter tensors."""
    layers = [nn.Linear(16, 16) for _ in range(parameters // 2 - 2)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *layers, nn.Linear(16, 10))


def grown(quick: bool) -> dict[str, dict[int, dict[str, Any]]]:
    """What grows, to which numbers, and what that means for a race."""
    growing: dict[str, dict[int, dict[str, Any]]] = {
        "parameter tensors": {n: {"net": lambda n=n: many(n)} for n in (4, 32, 128, 512)},
        "samples of a batch": {n: {"size": n} for n in (16, 64, 256, 1024)},
        "callbacks that override nothing": {n: {"callbacks": n} for n in (0, 10, 50)},
        "values logged in a step": {n: {"values": n} for n in (0, 1, 10, 50)},
        "validation sets": {n: {"sets": n} for n in (1, 4, 8)},
        "steps of an epoch": {n: {"steps": n, "per_epoch": 1} for n in (1000, 100, 10)},
    }
    return (
        {what: {n: numbers[n] for n in sorted(numbers)[:2]} for what, numbers in growing.items()} if quick else growing
    )


def growth(rounds: int, steps: int, quick: bool) -> Table:
    """A line for each number of each thing that grows."""
    note = f"CPU time, medians of {rounds} rounds, tiny net. Validation counts: a batch of it is called a step, too."
    table = Table("cost of a step as a run grows", "what grows", note, "scale/growth")
    for what, numbers in grown(quick).items():
        for number, options in numbers.items():
            options = {"steps": max(steps // options.get("sets", 1), 5), **options}
            laps = race(rounds, **options)
            size = options["steps"] * (1 + options.get("sets", 0))
            ours, hand = (statistics.median(column) / size * 1e6 for column in zip(*laps, strict=True))
            more = statistics.median(trainer - by_hand for trainer, by_hand in laps) / size * 1e6
            ratios = ratio_cells([trainer / by_hand for trainer, by_hand in laps])
            cells = {"number": f"{number:,}", "Trainer": f"{ours:,.0f} µs", "by hand": f"{hand:,.0f} µs"}
            table.add(what, {**cells, "more": f"{more:,.1f} µs", **ratios}, round(more, 2))
    return table


class Memory(engine.Callback):
    """Notes what the process holds, at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.held = steps, list[tuple[float, int]]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, after collecting garbage."""
        if trainer.global_step in self.steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
            self.held.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sys.getallocatedblocks()))


def memory(steps: int) -> Table:
    """What steps leave behind, with a value logged in each."""
    warm = steps // 2
    # To look leaves something behind, too, the first time.
    looks = Memory(warm // 2, warm, warm + steps)
    # One block, since blocks leave their times behind.
    endless = Alternation(lambda: None, warm + steps)
    with tempfile.TemporaryDirectory() as folder:
        logger: Any = CSVLogger(folder)
        trainer = engine.Trainer(accelerator="cpu", logger=logger, callbacks=[looks], max_epochs=1, **QUIET)
        trainer.fit(Training(tiny(), endless, names_of(1)), in_memory(batches_of(64, 1) * endless.size))
    _, (megabytes, blocks), (later_megabytes, later_blocks) = looks.held
    table = Table(f"memory after {steps:,} further steps", "what", f"After {warm:,} steps to warm up.", "scale/memory")
    for name, before, after, unit, limit in (
        ("resident memory", megabytes, later_megabytes, "MB", 1.0),
        ("blocks of Python's allocator", blocks, later_blocks, "", steps / 100),
    ):
        cells = {
            "before": f"{before:,.0f} {unit}",
            "after": f"{after:,.0f} {unit}",
            "growth": f"{after - before:+,.1f}",
        }
        table.add(name, cells, after - before, Goal(limit))
    return table


def main() -> None:
    """Let things grow, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest numbers of each, shortly")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each race [11]")
    parser.add_argument("--steps", type=int, default=100, help="steps of a round [100]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds, steps = (2, 10) if arguments.quick else (arguments.rounds, arguments.steps)
    record("scale", [growth(rounds, steps, arguments.quick), memory(200 if arguments.quick else 10_000)])


if __name__ == "__main__":
    main()

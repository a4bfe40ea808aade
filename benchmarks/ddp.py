"""What a training step on 2 processes costs under the Trainer, and in a loop written by hand that does the same.

Both wrap the same net in DistributedDataParallel, over gloo on the CPU, and read the same batches from memory. They
take turns within one run, quietly and with a loss that is logged, averaged over the processes. Printed are medians.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

import engine
from alternating import Alternation
from engine.loggers import CSVLogger
from model.standard_net import StandardNet
from tables import Goal, Table, ratio_cells, record
from work import Batch, in_memory, tiny

# A block is what is run in one turn, and every how many steps is logged: the Trainer's default.
PROCESSES, BLOCK = 2, 50
GOAL = 1.03


class Training(engine.Module):
    """A classification, as one writes it for the Trainer."""

    def __init__(self, net: nn.Module, turns: Alternation, logs: bool) -> None:
        super().__init__()
        self.net, self.turns, self.logs = net, turns, logs

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the other have its turn; not within the step, which runs in DistributedDataParallel's forward."""
        self.turns.tick()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        if self.logs:
            self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The default of the project."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def hand_written(net: nn.Module, batches: list[Batch], logs: bool, file: TextIO) -> Callable[[], None]:
    """A block of the plainest loop."""
    loader = in_memory(batches, sampler=DistributedSampler(batches, shuffle=False))  # type: ignore[arg-type]
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4)
    writer, steps = csv.writer(file), itertools.count(1)

    def block() -> None:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(ddp(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if logs and (number := next(steps)) % BLOCK == 0:
                value = loss.detach().clone()
                dist.all_reduce(value)
                writer.writerow([number, value.item() / PROCESSES])

    return block


def race(make: Callable[[], nn.Module], batches: list[Batch], logs: bool, blocks: int) -> list[tuple[float, float]]:
    """Seconds of each block, under the Trainer and by hand."""
    # A sampler gives each process every second of these: all batches, in order.
    batches = [batch for batch in batches for _ in range(PROCESSES)]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "by_hand.csv"), "w", newline="") as file:
        turns = Alternation(hand_written(make(), batches, logs, file), BLOCK, time.perf_counter)
        trainer = engine.Trainer(
            accelerator="cpu",
            logger=CSVLogger(folder) if logs else False,
            log_every_n_steps=BLOCK,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
        )
        trainer.fit(Training(make(), turns, logs), in_memory(batches * (blocks + 2)))
    # The first block warms up, and the last has no border behind it.
    return turns.laps[1:]


def standard() -> nn.Module:
    """The net that a generated project starts with."""
    return StandardNet(10, (1, 8, 8))


def measure(arguments: argparse.Namespace) -> None:
    """Race on every net, quietly and with logs; the first process prints a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    size = arguments.batch_size
    batches = [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for _ in range(BLOCK)]
    note = (
        f"gloo, 1 thread each, medians of blocks of {BLOCK} steps; losses are averaged over both and logged after each."
    )
    table = Table(f"a step on {PROCESSES} processes, batches of {size}", "net", note, "ddp")
    for name, make, blocks in (("tiny", tiny, 5 * arguments.blocks), ("standard_net", standard, arguments.blocks)):
        for logs in (False, True):
            pairs = race(make, batches, logs, blocks)
            ours, theirs = (statistics.median(column) / BLOCK * 1e3 for column in zip(*pairs, strict=True))
            ratios = [trainer / hand for trainer, hand in pairs]
            cells = {"Trainer": f"{ours:.3f} ms", "by hand": f"{theirs:.3f} ms", **ratio_cells(ratios)}
            what = f"{name}, logged" if logs else name
            table.add(what, cells, round(statistics.median(ratios), 3), Goal(GOAL))
    if dist.get_rank() == 0:
        record("ddp", [table])
    dist.destroy_process_group()


def main() -> None:
    """Start this file once for each process, and measure there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch_size": 64, "blocks": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    sys.exit(subprocess.call([*launcher, *sys.argv], env={"OMP_NUM_THREADS": "1", **os.environ}))


if __name__ == "__main__":
    main()

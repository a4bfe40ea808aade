"""How fast batches are read: 60,000 images of 28 x 28 in MNIST's file format, cropped and mirrored at random.

The two usual pipelines (torchvision's MNIST, transforms for each sample, of the image or of a tensor made of it, in
torch's DataLoader) against what a generated project trains from: `--dataset torchvision_data`, read by the Trainer's
own `Reader`, each sample with random numbers of its own. Same files, same augmentation, same batch size, same workers.
All are read to the end in turn, several times, so that no worker is left with anything to do while another is measured;
the usual ones, which are slower, have the first samples only. Printed are medians and quartiles of samples a second,
and of the ratio to the faster of the usual pipelines in the same turn.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mnist
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

from data import DInterface
from engine.data import prepare_loader
from engine.reading import Reader
from tables import Goal, Table, record, spread
from utils.registry import build_dataset

# The margin of torchvision_data: an eighth of the height.
PADDING, GOAL = 3, 5.0
Epoch = Callable[[int], Iterable[Any]]
OURS = "ours"


def usual(root: Path, batch_size: int, workers: int, samples: int, on_tensors: bool) -> Epoch:
    """The set of torchvision, with transforms for each sample, in torch's loader."""
    move: list[Any] = [v2.RandomCrop(28, padding=PADDING), v2.RandomHorizontalFlip()]
    steps = [v2.ToImage(), *move] if on_tensors else [*move, v2.ToImage()]
    data = MNIST(root, transform=v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)]))
    chosen = Subset(data, range(min(samples, len(data))))
    loader = DataLoader(chosen, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda epoch: loader


def ours(root: Path, batch_size: int, workers: int) -> Epoch:
    """What a project trains from: the loader of DInterface, prepared and read by the engine."""
    flags = {"root": str(root), "name": "MNIST", "flip": True}
    data = DInterface("torchvision_data", batch_size=batch_size, num_workers=workers, data=flags)
    # All 60,000 to train on: setup would take some out to validate on.
    data.sets["train"] = {data.train_name: build_dataset(data.train_name, "train", flags)}
    loader = prepare_loader(data.train_dataloader(), seed=0, training=True)
    reader = Reader(loader, len(loader))
    return lambda epoch: (batch for _, batch, _ in reader.epoch(0, epoch))


def drain(read: Epoch, epoch: int) -> float:
    """Samples a second of one epoch."""
    gc.collect()
    count, begin = 0, time.perf_counter()
    for images, _ in read(epoch):
        count += len(images)
    return count / (time.perf_counter() - begin)


def race(epochs: dict[str, Epoch], repeats: int) -> dict[str, list[float]]:
    """Samples a second of each in each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(repeats + 1):
        for name, read in epochs.items():
            speeds[name].append(drain(read, repeat))
    # In the first turn workers start and files are opened.
    return {name: found[1:] for name, found in speeds.items()}


def fill(table: Table, workers: int, speeds: dict[str, list[float]]) -> None:
    """A line for each; ours is compared with the faster of the others."""
    others = [name for name in speeds if name != OURS]
    fastest = max(others, key=lambda name: statistics.median(speeds[name]))
    for name, found in speeds.items():
        low, middle, high = spread(found)
        cells = {"workers": str(workers), "samples/s": f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"}
        low, middle, high = spread([a / b for a, b in zip(found, speeds[fastest], strict=True)])
        cells["ratio"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        table.add(name, cells, middle, Goal(GOAL, at_least=True) if name == OURS else None)


def main() -> None:
    """Drain all loaders in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch_size": 64, "repeats": 5, "threads": os.cpu_count() or 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--samples", type=int, default=12_800, help="samples of the usual pipelines [12800]")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="[0 2]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, size, samples = mnist.write(), arguments.batch_size, arguments.samples
    turns = f"in brackets where half of the {arguments.repeats} turns lay"
    note = f"Samples a second; {arguments.threads} thread(s); {turns}. "
    note += f"Ratios are to the faster of the usual pipelines, which read the first {samples:,} samples."
    title = f"an epoch of 60,000 images of 28 x 28, only read, cropped and mirrored at random, batches of {size}"
    table = Table(title, "loader", note, "loader")
    for workers in arguments.workers:
        epochs = {
            "usual, transforms of PIL images": usual(folder, size, workers, samples, on_tensors=False),
            "usual, transforms of tensors": usual(folder, size, workers, samples, on_tensors=True),
            OURS: ours(folder, size, workers),
        }
        fill(table, workers, race(epochs, arguments.repeats))
    record("loader", [table])


if __name__ == "__main__":
    main()

"""How fast batches are read: 60,000 images of 28 x 28 in MNIST's file format, cropped and mirrored at random.

The usual pipeline (torchvision's MNIST, a transform for each sample, torch's DataLoader) against what a generated
project trains from: `--dataset torchvision_data`, read as the Trainer reads it, each sample with random numbers of its
own. Same files, same augmentation, same batch size, same workers. Both are drained in turn, several times; printed are
medians and quartiles of samples a second, and of the ratio to the usual pipeline in the same turn.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import mnist
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))

from data import DInterface
from engine.data import prepare_loader
from engine.reading import start_epoch
from tables import Goal, Table, record, spread
from utils.registry import build_dataset

# The margin of torchvision_data: an eighth of the height.
PADDING, GOAL = 3, 5.0
Loader = Callable[[int], Iterable[Any]]


def usual(root: Path, batch_size: int, workers: int) -> Loader:
    """The set of torchvision, with transforms for each sample, in torch's loader."""
    steps = [v2.ToImage(), v2.RandomCrop(28, padding=PADDING), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True)]
    data = MNIST(root, transform=v2.Compose(steps))
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda epoch: loader


def ours(root: Path, batch_size: int, workers: int, on_device: bool = False) -> Loader:
    """What a project trains from: the loader of DInterface, prepared by the engine."""
    flags = {"root": str(root), "name": "MNIST", "flip": True}
    data = DInterface("torchvision_data", batch_size=batch_size, num_workers=workers, on_device=on_device, data=flags)
    # All 60,000 to train on: setup would take some out to validate on.
    data.sets["train"] = {data.train_name: build_dataset(data.train_name, "train", flags)}
    loader = prepare_loader(data.train_dataloader(), seed=0, training=True)

    def begin(epoch: int) -> Iterable[Any]:
        start_epoch(loader, 0, epoch)
        return loader  # type: ignore[no-any-return]

    return begin


def drain(loader: Loader, epoch: int, batches: int) -> float:
    """Samples a second of one epoch, or of its first batches."""
    gc.collect()
    count, begin = 0, time.perf_counter()
    for images, _ in islice(loader(epoch), batches):
        count += len(images)
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Drain all loaders in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch_size": 64, "batches": 200, "repeats": 5, "threads": os.cpu_count() or 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="[0 2]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = mnist.write()
    note = (
        f"Samples a second; {arguments.threads} thread(s); in brackets where half of the {arguments.repeats} turns lay."
    )
    title = "A drained loader of 60,000 images of 28 x 28, cropped and mirrored at random, batches of"
    table = Table(f"{title} {arguments.batch_size}", "loader", note, "loader")
    for workers in arguments.workers:
        loaders = {"usual": usual(folder, arguments.batch_size, workers)}
        loaders["ours"] = ours(folder, arguments.batch_size, workers)
        if not workers:
            loaders["ours, --on_device (CPU)"] = ours(folder, arguments.batch_size, 0, on_device=True)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(-1, arguments.repeats):
            for name, loader in loaders.items():
                speed = drain(loader, repeat + 1, 10 if repeat < 0 else arguments.batches)
                if repeat >= 0:  # before it, workers have started and files are open
                    speeds[name].append(speed)
        for name, found in speeds.items():
            low, middle, high = spread(found)
            cells = {"workers": str(workers), "samples/s": f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"}
            if name == "usual":
                table.add(name, cells)
                continue
            low, middle, high = spread([a / b for a, b in zip(found, speeds["usual"], strict=True)])
            table.add(
                name, {**cells, "ratio": f"{middle:.1f} ({low:.1f} to {high:.1f})"}, middle, Goal(GOAL, at_least=True)
            )
    record("loader", [table])


if __name__ == "__main__":
    main()

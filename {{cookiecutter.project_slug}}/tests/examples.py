"""What the tests hand to a net or a dataset that needs more than its name: a line of flags, and tiny files."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import torch
from PIL import Image

# Flags by name; {folder} holds the files made below.
FLAGS: dict[str, list[str]] = {
    "torchvision_data": ["--data.name", "MNIST", "--data.root", "{folder}"],
    "folder_data": ["--data.root", "{folder}/pictures", "--data.size", "16"],
    "csv_data": ["--data.file", "{folder}/table.csv", "--model_name", "mlp"],
    "mlp": ["--data.file", "{folder}/table.csv", "--dataset", "csv_data"],
}


def write_files(folder: Path) -> None:
    """A tiny set in each format: MNIST's own, so that torchvision reads it without a download, pictures, a table."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        header = struct.pack(">4i", 2051, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.numpy().tobytes())
    for number in range(40):
        picture = folder / "pictures" / ("cat", "dog")[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()).save(picture)
    with (folder / "table.csv").open("w", newline="") as file:
        rows = [[number, number % 7, ("low", "high")[number % 2]] for number in range(40)]
        csv.writer(file).writerows([["a", "b", "class"], *rows])

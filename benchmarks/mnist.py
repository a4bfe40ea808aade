"""A set in MNIST's file format, made from the digits of the project: 60,000 + 10,000 images of 28 x 28 pixels.

Each is one of the 1,797 real digits, enlarged, moved, turned up or down in contrast, with noise; the same in every run.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from work import PROJECT

SIZE, MARGIN = 28, 4
SIZES = {"train": 60_000, "t10k": 10_000}
FOLDER = Path(__file__).parents[1] / "build" / "bench" / "mnist"


def images_and_labels(count: int, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """Digits: uint8 of shape (count, 28, 28), and their classes, uint8. The test images come from the test split."""
    with np.load(PROJECT / "data" / "digits.npz") as digits:
        chosen = (digits["split"] == 2) == test
        small, labels = torch.from_numpy(digits["images"][chosen]).float(), digits["labels"][chosen]
    draw = np.random.default_rng(int(test))
    enlarged = functional.interpolate(small[:, None], size=SIZE - 2 * MARGIN, mode="bilinear")[:, 0].numpy() / 16
    which, moves = draw.integers(len(labels), size=count), draw.integers(2 * MARGIN + 1, size=(count, 2))
    images = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    for image, source, (top, left) in zip(images, which, moves, strict=True):
        image[top : top + enlarged.shape[1], left : left + enlarged.shape[2]] = enlarged[source]
    images *= draw.uniform(0.7, 1.0, size=(count, 1, 1)).astype(np.float32)
    images += draw.normal(0, 0.05, size=images.shape).astype(np.float32)
    return (images.clip(0, 1) * 255).astype(np.uint8), labels[which].astype(np.uint8)


def write(root: Path = FOLDER, sizes: dict[str, int] = SIZES) -> Path:
    """Write the four files below `root/MNIST/raw`, unless they are there; returns the root, for torchvision's MNIST."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in sizes.items():
        names = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
        if all(name.is_file() for name in names):
            continue
        for name, values in zip(names, images_and_labels(count, part == "t10k"), strict=True):
            # Two zero bytes, 8 for uint8, the number of dimensions, and each of them.
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            name.write_bytes(header + values.tobytes())
    return root

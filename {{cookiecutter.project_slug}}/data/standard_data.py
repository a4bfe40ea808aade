"""Your dataset. As it stands, it holds 1,797 handwritten digits, which lie beside this file (`digits.md`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.augmentation import random_crop, take

SPLITS = ["train", "val", "test"]


class StandardData(Dataset[tuple[Tensor, Tensor]]):
    """Handwritten digits of 8 x 8 pixels, in 10 classes.

    A sample is an image, float32 of shape (1, 8, 8) from 0 to 1, and its class, an int64 from 0 to 9.

    Args:
        split: Which samples: "train", "val", "test", or "predict" (the test images).
        augment: Move training images by up to one pixel, at random.
    """

    # FILL IN: what your samples look like; nets that ask for these get them.
    num_classes = 10
    sample_shape = (1, 8, 8)

    def __init__(self, split: Literal["train", "val", "test", "predict"], augment: bool = True) -> None:
        # FILL IN: read your own files; keep what fits into memory, read the rest in __getitem__.
        with np.load(Path(__file__).with_name("digits.npz")) as digits:
            chosen = digits["split"] == SPLITS.index("test" if split == "predict" else split)
            self.images = torch.from_numpy(digits["images"][chosen]).float().div(16).unsqueeze(1)
            self.targets = torch.from_numpy(digits["labels"][chosen]).long()
        # Saved in checkpoints, for whoever uses the net elsewhere.
        self.preprocessing = {"channels": "L", "range": [0, 1]}
        # Looked at when reading, because validation samples that are taken out of training data get it switched off.
        self.augment = augment and split == "train"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # One sample: a batch of one.
        images, targets = type(self).__getitems__(self, [index])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # FILL IN: return a batch, changed at random only if self.augment. It is many times faster than one by one; for
        # what cannot be done so, such as files to read, remove this method, and return one sample above.
        images, targets = take(self.images, indices), take(self.targets, indices)
        if self.augment:
            images = random_crop(images, padding=1)
        return images, targets

"""Image classification sets of torchvision, by name: MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN and the like."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional

from utils.augmentation import random_crop, random_flip, scaled, take


class TorchvisionData(Dataset[tuple[Tensor, Tensor]]):
    """One of torchvision's sets of images, with its training and test images.

    A sample is an image, float32 of shape (channels, height, width) from 0 to 1, and its class.

    Args:
        split: Which samples: "train", "test", or "predict" (the test images).
        name: Name of the class in torchvision.datasets, such as MNIST or CIFAR10.
        root: Folder that holds the files.
        download: Fetch the files if they are not there.
        size: Height and width to which images are brought (resized, then cropped). Default: as they are.
        augment: Crop training images at random, after padding by an eighth.
        flip: Also mirror them at random: right for photographs, wrong for digits and letters.
    """

    splits = ("train", "test", "predict")

    def __init__(
        self,
        split: Literal["train", "val", "test", "predict"],
        name: str = "MNIST",
        root: str = "datasets",
        download: bool = False,
        size: int | None = None,
        augment: bool = True,
        flip: bool = False,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"{name} has no split {split} of its own; it has {', '.join(self.splits)}")
        if size is not None and size < 1:
            raise ValueError(f"size={size}; give a whole number from 1")
        self.name, self.size, self.flip = name, size, flip
        self.augment = augment and split == "train"
        self.source = _open(name, root, download, training=split == "train")
        self.targets = torch.tensor(_targets(self.source))
        self.class_names = [str(c) for c in getattr(self.source, "classes", range(int(self.targets.max()) + 1))]
        self.num_classes = len(self.class_names)
        self.sample_shape = tuple(self._read(0).shape)
        self._read(len(self) - 1)
        self.preprocessing: dict[str, Any] = {"channels": "L" if self.sample_shape[0] == 1 else "RGB", "range": [0, 1]}
        if size is not None:
            self.preprocessing["resize"] = f"shorter side to {size}, then centre crop"
        self.images = _all_images(self.source) if size is None else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = type(self).__getitems__(self, [index])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if self.images is not None:
            pixels = take(self.images, indices)
        else:
            pixels = torch.stack([self._read(index) for index in indices])
        if self.augment:
            pixels = random_crop(pixels, padding=pixels.shape[-2] // 8)
            pixels = random_flip(pixels) if self.flip else pixels
        return scaled(pixels), take(self.targets, indices)

    def _read(self, index: int) -> Tensor:
        """One image, uint8 of shape (channels, height, width), as torchvision reads it."""
        image = functional.to_dtype(functional.to_image(self.source[index][0]), torch.uint8, scale=True)
        if self.size is not None:
            image = functional.center_crop(functional.resize(image, [self.size]), [self.size])
        if image.shape != getattr(self, "sample_shape", image.shape):
            sizes = f"{self.sample_shape} and {tuple(image.shape)}"
            raise ValueError(f"{self.name} has images of different shapes, {sizes}; give a size, as --data.size 64")
        return image.as_subclass(Tensor)


def _open(name: str, root: str, download: bool, training: bool) -> Any:
    cls = getattr(datasets, name, None)
    accepted = set(inspect.signature(cls).parameters) if isinstance(cls, type) else set()
    if not {"root", "download"} <= accepted or not accepted & {"train", "split"}:
        raise ValueError(f"name={name} is no classification set of torchvision.datasets that it could fetch by itself")
    which = {"train": training} if "train" in accepted else {"split": "train" if training else "test"}
    try:
        return cls(root=root, download=download, **which)  # type: ignore[misc]
    except ImportError as error:
        raise ValueError(f"{name} is in a format that needs another package ({error}); install it with pip") from error
    except RuntimeError as error:
        raise ValueError(f"{name} is not in {root}/ ({error}); fetch it with --data.download true") from error


def _targets(source: Any) -> list[int]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(source, name):
            return [int(target) for target in getattr(source, name)]
    if hasattr(source, "_samples"):
        return [int(target) for _, target in source._samples]
    return [int(source[index][1]) for index in range(len(source))]


def _all_images(source: Any) -> Tensor | None:
    """All images, uint8 of shape (images, channels, height, width), if the set holds them in memory."""
    data = np.asarray(getattr(source, "data", None))
    if data.dtype != np.uint8:
        return None
    # Sets differ in where they have the channels: what matches the first image that torchvision gives is right.
    first = np.asarray(functional.to_image(source[0][0]))
    for order in [data[:, None]] if data.ndim == 3 else [data, np.moveaxis(data, -1, 1)]:
        if np.array_equal(order[0], first):
            return torch.from_numpy(np.ascontiguousarray(order))
    return None

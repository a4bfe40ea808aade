"""Image classification sets of torchvision, by name: MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN and the like."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from utils.splits import stratified_split


class TorchvisionData(Dataset[tuple[Tensor, int]]):
    """One of torchvision's sets, with a validation split taken from its training images.

    A sample is an image, float32 of shape (channels, height, width) from 0 to 1, and its class.

    Args:
        split: Which samples: "train", "val", "test", or "predict" (the test images).
        name: Name of the class in torchvision.datasets, such as MNIST or CIFAR10.
        root: Folder that holds the files.
        download: Fetch the files if they are not there.
        val_fraction: Share of the training images to validate on, the same in every class.
        augment: Crop training images at random, after padding by an eighth.
        flip: Also mirror them at random: right for photographs, wrong for digits and letters.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test", "predict"],
        name: str = "MNIST",
        root: str = "datasets",
        download: bool = False,
        val_fraction: float = 0.1,
        augment: bool = True,
        flip: bool = False,
    ) -> None:
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction}; give a share between 0 and 1")
        self.source = _open(name, root, download, training=split in ("train", "val"))
        labels = _labels(self.source)
        self.indices = list(range(len(labels)))
        if split in ("train", "val"):
            train, val = stratified_split(labels, [1 - val_fraction, val_fraction], seed=0)
            self.indices = train if split == "train" else val
        image = v2.functional.to_image(self.source[0][0])
        self.sample_shape = tuple(image.shape)
        self.num_classes = len(set(labels))
        steps: list[Any] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        if augment and split == "train":
            height, width = self.sample_shape[1:]
            steps.append(v2.RandomCrop((height, width), padding=height // 8))
            if flip:
                steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[self.indices[index]]
        return self.transform(image), int(label)


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


def _labels(source: Any) -> list[int]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(source, name):
            return [int(label) for label in getattr(source, name)]
    return [int(source[index][1]) for index in range(len(source))]

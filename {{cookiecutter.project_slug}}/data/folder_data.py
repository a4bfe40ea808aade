"""Your own pictures, in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from utils.pictures import PICTURES, describe_reading, files_below, read_picture
from utils.splits import SPLIT_WORDS


class FolderData(Dataset[Any]):
    """Pictures in one folder per class, such as pictures/cat/1.jpg.

    Splits of their own lie in folders train, val and test, such as pictures/train/cat/1.jpg; those that are missing
    are taken out of the training pictures. A folder predict may hold pictures without classes.

    A sample is an image, float32 of shape (channels, size, size) from 0 to 1, and its class; or the image alone, where
    it has no class. Classes are numbered in the order of their folders' names.

    Args:
        split: Which samples: "train", "val", "test", or "predict" (folder predict, or else the test pictures).
        root: Folder that holds the folders.
        size: Height and width of images: the shorter side is resized to it, the longer one cropped.
        grayscale: Read pictures with one channel instead of three.
        augment: Crop training images at random, after padding by an eighth.
        flip: Also mirror them at random: right for photographs, wrong for digits and letters.
    """

    splits: tuple[str, ...]

    def __init__(
        self,
        split: Literal["train", "val", "test", "predict"],
        root: str = "datasets/pictures",
        size: int = 64,
        grayscale: bool = False,
        augment: bool = True,
        flip: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}; give a whole number from 1")
        self.root, self.size, self.grayscale, self.flip = Path(root), size, grayscale, flip
        self.augment = augment and split == "train"
        self.sample_shape = (1 if grayscale else 3, size, size)
        self.preprocessing = describe_reading(size, grayscale)
        folders = _split_folders(self.root)
        if split not in folders:
            raise ValueError(f"{root} has no split {split} of its own; it has {', '.join(folders)}")
        self.splits = tuple(folders)
        self.class_names = _class_folders(folders["train"], folders)
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            what = f"one class only ({self.class_names[0]})" if self.class_names else "no folders"
            raise ValueError(f"{folders['train']} holds {what}; give each class a folder of pictures, as in cat/1.jpg")
        self.targets: list[int] | None = None
        if split == "predict" and folders["predict"] != folders.get("test"):
            self.names = files_below(self.root, folders["predict"])
        else:
            self.names, self.targets = self._labelled(split, folders)
        if not self.names:
            raise ValueError(f"{folders[split]} holds no pictures ({' '.join(PICTURES)}); add some or remove it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        file = self.root / self.names[index]
        image = read_picture(file, self.size, self.grayscale, self.augment, self.flip)
        return image if self.targets is None else (image, self.targets[index])

    def _labelled(self, split: str, folders: dict[str, Path]) -> tuple[list[str], list[int]]:
        """Names and classes of all pictures of a split."""
        names: list[str] = []
        targets: list[int] = []
        for name in _class_folders(folders[split], folders):
            folder = folders[split] / name
            if name not in self.class_names:
                known = ", ".join(self.class_names)
                raise ValueError(f"{folder} is a class that {folders['train']} does not have; it has {known}")
            found = files_below(self.root, folder)
            if split == "train" and not found:
                raise ValueError(f"{folder} holds no pictures ({' '.join(PICTURES)}); add some or remove it")
            names += found
            targets += [self.class_names.index(name)] * len(found)
        return names, targets


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that there is."""
    if not root.is_dir():
        raise ValueError(
            f"there is no folder {root}; make it, with a folder of pictures for each class, or give a root"
        )
    splits: dict[str, Path] = {}
    for folder in _folders(root):
        if (split := SPLIT_WORDS.get(folder.lower())) is not None:
            if split in splits:
                raise ValueError(f"{root} has {splits[split].name} and {folder}, both for {split}; keep one of them")
            splits[split] = root / folder
    if splits.keys() & {"val", "test"} and "train" not in splits:
        raise ValueError(f"{root} has {', '.join(f.name for f in splits.values())} and no folder train; add it")
    # Without a folder train the classes lie in root itself.
    splits.setdefault("train", root)
    if "test" in splits:
        splits.setdefault("predict", splits["test"])
    return splits


def _class_folders(folder: Path, splits: dict[str, Path]) -> list[str]:
    return [name for name in _folders(folder) if folder / name not in splits.values()]


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))

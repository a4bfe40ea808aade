"""Sets of torchvision by name, read by torchvision itself from tiny files in each set's own format."""

from __future__ import annotations

import copy
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import MisconfigurationException
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.v2 import functional
from utils.registry import build
from utils.samples import as_batch

RANDOM = np.random.default_rng(0)
SETS = ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"]


def write_mnist(root: Path, name: str) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = RANDOM.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def write_cifar(root: Path, cls: type, key: str, patch: pytest.MonkeyPatch) -> None:
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    # The files are ours, so are their checksums.
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(cls, attribute)]
        patch.setattr(cls, attribute, [[name, None] for name in names])
        for name in names:
            images = RANDOM.integers(256, size=(40, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": images, key: [i % 10 for i in range(40)]}))
    patch.setattr(cls, "meta", {**cls.meta, "md5": None})
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: [str(i) for i in range(10)]}))


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    root.mkdir(exist_ok=True)
    patch.setattr(datasets.SVHN, "split_list", {k: [*v[:2], None] for k, v in datasets.SVHN.split_list.items()})
    for split in ("train", "test"):
        images = RANDOM.integers(256, size=(32, 32, 3, 40), dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": (np.arange(40) % 10 + 1)[:, None]})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "sets"
    write_mnist(root, "MNIST")
    write_mnist(root, "FashionMNIST")
    write_cifar(root, datasets.CIFAR10, "labels", monkeypatch)
    write_cifar(root, datasets.CIFAR100, "fine_labels", monkeypatch)
    write_svhn(root, monkeypatch)
    return root


@pytest.mark.parametrize("name", SETS)
def test_a_set_trains_by_name(name: str, root: Path, run: Callable) -> None:
    flags = ("--data.name", name, "--data.root", str(root), "--data.flip", "true", "--batch_size", "8")
    outcome = run("--dataset", "torchvision_data", *flags, "--fast_dev_run", "true")
    assert outcome.code == 0, outcome.err


def torchvision_data(root: Path, split: str = "train", **arguments: Any) -> Any:
    return build("data", "torchvision_data", {"split": split, "root": str(root), **arguments})


@pytest.mark.parametrize("name", SETS)
def test_a_sample_is_what_torchvision_gives(name: str, root: Path) -> None:
    for split in ("train", "test", "predict"):
        data = torchvision_data(root, split, name=name, augment=False)
        assert data.num_classes == len(data.class_names) == 10 if name != "CIFAR100" else 100
        assert len(data) == len(data.targets) == len(data.source)
        batch = list(zip(*data.__getitems__([len(data) - 1, 0]), strict=True))
        for image, _ in [*batch, data[0]]:
            assert image.dtype == torch.float32 and tuple(image.shape) == data.sample_shape
        for index, (image, target) in zip((len(data) - 1, 0), batch, strict=True):
            expected, label = data.source[index]
            image_of_source = functional.to_dtype(functional.to_image(expected), torch.float32, scale=True)
            torch.testing.assert_close(image, torch.as_tensor(image_of_source), rtol=0, atol=1e-6)
            assert target == label == data.targets[index]
            assert torch.equal(data[index][0], image)


def test_it_has_no_validation_split_of_its_own(root: Path) -> None:
    assert torchvision_data(root).splits == ("train", "test", "predict")
    with pytest.raises(MisconfigurationException, match="no split val of its own; it has train, test, predict"):
        torchvision_data(root, "val")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_augmentation_moves_each_image_of_a_batch_by_itself(name: str, root: Path) -> None:
    data = torchvision_data(root, name=name, flip=True)
    plain = copy.copy(data)
    plain.augment = False
    assert data.augment and not torchvision_data(root, "test", name=name).augment
    original = plain[0][0]
    margin = original.shape[1] // 8
    height, width = original.shape[1:]
    padded = [F.pad(image, (margin,) * 4) for image in (original, original.flip(-1))]
    shifts = range(2 * margin + 1)
    allowed = {
        (t, left, m): padded[m][:, t : t + height, left : left + width]
        for t in shifts
        for left in shifts
        for m in (0, 1)
    }
    seen = set()
    for image, target in zip(*data.__getitems__([0] * 100), strict=True):
        assert image.shape == original.shape and target == data.targets[0]
        seen |= {place for place, expected in allowed.items() if torch.equal(image, expected)}
    assert len(seen) > 40 and {mirrored for *_, mirrored in seen} == {0, 1}
    unmirrored = torchvision_data(root, name=name)
    for image in unmirrored.__getitems__([0] * 20)[0]:
        assert any(torch.equal(image, allowed[top, left, 0]) for top in shifts for left in shifts)


class Various(datasets.VisionDataset):
    """Images of different sizes, read one by one."""

    classes = ["even", "odd"]

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        super().__init__(root)
        self._samples = [(index, index % 2) for index in range(6)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (20 + index, 30), (255, 0, 0)), index % 2


def test_images_of_different_sizes_need_a_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "Various", Various, raising=False)
    with pytest.raises(MisconfigurationException, match=r"Various has images of different shapes.*--data.size 64"):
        torchvision_data(root, name="Various")
    data = torchvision_data(root, name="Various", size=16, flip=True)
    assert data.targets.tolist() == [0, 1] * 3 and data.class_names == ["even", "odd"]
    batch = DataLoader(data, batch_size=6, shuffle=True, collate_fn=as_batch)
    assert next(iter(batch))[0].shape == (6, 3, 16, 16)
    assert torchvision_data(root, name="MNIST", size=14)[0][0].shape == (1, 14, 14)
    with pytest.raises(MisconfigurationException, match="size=0"):
        torchvision_data(root, size=0)


@pytest.mark.parametrize("name", ["NoSuchSet", "ImageFolder", "FakeData", "VOCDetection", "folder"])
def test_an_unknown_name_is_refused(name: str, root: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"name={name} is no classification set"):
        torchvision_data(root, name=name)


def test_missing_files_are_to_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="MNIST is not in .*; fetch it with --data.download true"):
        torchvision_data(tmp_path / "nowhere")


def test_a_missing_package_is_named(root: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    outcome = run("--dataset", "torchvision_data", "--data.name", "SVHN", "--data.root", str(root))
    assert outcome.code == 2 and "needs another package" in outcome.err and "scipy" in outcome.err

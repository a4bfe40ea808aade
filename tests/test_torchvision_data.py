"""Sets of torchvision by name, read by torchvision itself from tiny files in each set's own format."""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

RANDOM = np.random.default_rng(0)


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


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_a_set_trains_by_name(name: str, root: Path, run: Callable) -> None:
    flags = ("--data.name", name, "--data.root", str(root), "--data.flip", "true", "--batch_size", "8")
    outcome = run("--dataset", "torchvision_data", *flags, "--fast_dev_run", "true")
    assert outcome.code == 0, outcome.err


def test_train_and_validation_are_disjoint_stratified_and_always_the_same(root: Path) -> None:
    from data.torchvision_data import TorchvisionData

    parts = [TorchvisionData(split, root=str(root), val_fraction=0.5) for split in ("train", "val", "train")]
    train, val, again = (set(part.indices) for part in parts)
    assert train == again and train | val == set(range(60)) and not train & val
    for part in parts:
        assert [int(count) for count in np.bincount([part.source.targets[i] for i in part.indices])] == [3] * 10


def test_a_missing_package_is_named(root: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    outcome = run("--dataset", "torchvision_data", "--data.name", "SVHN", "--data.root", str(root))
    assert outcome.code == 2 and "needs another package" in outcome.err and "scipy" in outcome.err

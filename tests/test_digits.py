"""The example data against the source that it was made from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
DATA = ROOT / "{{cookiecutter.project_slug}}" / "data"


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray]:
    with np.load(DATA / "digits.npz", allow_pickle=False) as file:
        return dict(file)


def test_images_and_labels_are_those_of_the_source(digits):
    source = load_digits()
    assert {key: (array.dtype.name, array.shape) for key, array in digits.items()} == {
        "images": ("uint8", (1797, 8, 8)),
        "labels": ("uint8", (1797,)),
        "split": ("uint8", (1797,)),
    }
    assert np.array_equal(digits["images"], source.images)
    assert np.array_equal(digits["labels"], source.target)


def test_each_class_is_split_70_15_15(digits):
    assert set(digits["split"]) == {0, 1, 2}
    for label in range(10):
        shares = np.bincount(digits["split"][digits["labels"] == label]) / np.sum(digits["labels"] == label)
        assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.01)


def test_no_image_is_in_two_splits(digits):
    splits = {}
    for image, split in zip(digits["images"], digits["split"], strict=True):
        assert splits.setdefault(image.tobytes(), split) == split


def test_the_tool_makes_the_same_arrays_again(digits, load, tmp_path):
    make_digits = load("tools/make_digits.py")
    make_digits.main(tmp_path / "one.npz")
    make_digits.main(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as again:
        assert sorted(again) == sorted(digits)
        assert all(np.array_equal(again[key], digits[key]) for key in digits)


def test_the_page_beside_it_states_source_license_and_counts(digits):
    page = (DATA / "digits.md").read_text(encoding="utf-8")
    assert "10.24432/C50P49" in page and "CC BY 4.0" in page
    for code, name in enumerate(("train", "val", "test")):
        row = re.search(rf"^\| {name} \|(.*)\|$", page, flags=re.MULTILINE)[1]
        counts = np.bincount(digits["labels"][digits["split"] == code])
        assert [int(cell.replace(",", "")) for cell in row.split("|")] == [*counts, counts.sum()]

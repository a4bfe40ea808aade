"""Splits: by shares, folds, groups and files; and what is found wrong with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import MisconfigurationException
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset
from utils.samples import check_sets, class_per_sample, fingerprint, per_sample, plain
from utils.splits import read_split_file, split

SHARES = st.sampled_from([[0.8, 0.2], [0.7, 0.2, 0.1], [0.2] * 5, [0.5, 0.5]])


@settings(max_examples=60, deadline=None)
@given(classes=st.lists(st.integers(0, 4), max_size=120), shares=SHARES, seed=st.integers(0, 9))
def test_every_sample_is_in_one_part_and_every_class_in_every_part_by_its_share(
    classes: list[int], shares: list[float], seed: int
) -> None:
    parts = split(len(classes), shares, seed, classes)
    assert sorted(index for part in parts for index in part) == list(range(len(classes)))
    assert all(part == sorted(part) for part in parts)
    totals = Counter(classes)
    for part, share in zip(parts, shares, strict=True):
        counts = Counter(classes[index] for index in part)
        assert all(abs(counts[name] - share * total) < 1 for name, total in totals.items())


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.integers(0, 8), min_size=1, max_size=100), shares=SHARES)
def test_no_group_is_in_two_parts(groups: list[int], shares: list[float]) -> None:
    parts = split(len(groups), shares, 0, None, groups)
    assert sorted(index for part in parts for index in part) == list(range(len(groups)))
    seen = [{groups[index] for index in part} for part in parts]
    assert sum(map(len, seen)) == len(set(groups))


def test_groups_of_many_sizes_still_give_parts_of_the_right_size_and_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(60, (1000,), generator=generator).tolist()
    classes = torch.randint(3, (1000,), generator=generator).tolist()
    for part in split(1000, [0.2] * 5, 0, classes, groups):
        assert 180 <= len(part) <= 220
        assert all(abs(count - 67) < 20 for count in Counter(classes[index] for index in part).values())


def test_the_seed_decides_and_nothing_else() -> None:
    classes = [0, 1] * 50
    state = torch.random.get_rng_state()
    first = split(100, [0.5, 0.5], 3, classes)
    torch.manual_seed(99)
    assert split(100, [0.5, 0.5], 3, classes) == first != split(100, [0.5, 0.5], 4, classes)
    torch.random.set_rng_state(state)


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    """Numbers from `first`, with all that a dataset may tell."""

    num_classes = 2

    def __init__(self, first: int, count: int, named: bool = True, augment: bool = False) -> None:
        self.values = list(range(first, first + count))
        self.targets = [value % 2 for value in self.values]
        if named:
            self.names = [f"n{value}" for value in self.values]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(()) if self.augment else 0
        return torch.tensor(float(self.values[index])) + noise, self.targets[index]


def test_attributes_are_found_through_subsets_of_several_datasets() -> None:
    dataset = Subset(ConcatDataset([Numbers(0, 3), Numbers(10, 3)]), [4, 0])
    assert per_sample(dataset, "names") == ["n11", "n0"]
    assert class_per_sample(dataset) == [1, 0]
    assert per_sample(dataset, "groups") is None
    assert class_per_sample(Subset(ConcatDataset([Numbers(0, 3)]), [])) is None


def test_a_plain_view_does_not_augment_and_leaves_the_dataset_as_it_is() -> None:
    dataset = Numbers(0, 3, augment=True)
    view = plain(Subset(ConcatDataset([dataset]), [2]))
    assert float(view[0][0]) == 2.0 and dataset.augment


def test_a_fingerprint_tells_data_apart_and_draws_nothing() -> None:
    state = torch.random.get_rng_state()
    assert fingerprint(Numbers(0, 50)) == fingerprint(Numbers(0, 50)) != fingerprint(Numbers(1, 50))
    assert fingerprint(Numbers(0, 50)).startswith("50 samples, ")
    assert torch.equal(torch.random.get_rng_state(), state)


WRONG_SETS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"train": Numbers(0, 4), "val": Numbers(0, 0)}, "dataset x: split val is empty"),
    "shared by name": ({"train": Numbers(0, 9), "test": Numbers(8, 3)}, "share 1 names, n8 among them"),
    "the same data": ({"train": Numbers(0, 9, False), "test": Numbers(0, 9, False)}, "share all samples"),
    "augmented and the same": ({"val": Numbers(0, 9, False), "train": Numbers(0, 9, False, True)}, "share all samples"),
}


@pytest.mark.parametrize("name", WRONG_SETS)
def test_wrong_sets_are_refused(name: str) -> None:
    sets, message = WRONG_SETS[name]
    with pytest.raises(MisconfigurationException, match=message):
        check_sets({split: {"x": dataset} for split, dataset in sets.items()})


def test_labels_out_of_range_are_refused() -> None:
    dataset = Numbers(0, 4)
    dataset.targets[2] = 2
    with pytest.raises(MisconfigurationException, match="has classes from 0 to 2, but its num_classes is 2"):
        check_sets({"train": {"x": dataset}})


def test_right_sets_are_not_refused() -> None:
    check_sets({"train": {"x": Numbers(0, 9)}, "val": {"x": Numbers(9, 9)}, "test": {"y": Numbers(0, 5)}})
    check_sets({"test": {"x": Numbers(0, 9)}, "predict": {"x": Numbers(0, 9)}})


SPLIT_FILES = {
    "unknown split": ("sample,split\na,dev\n", "line 2: sample=a, split=dev"),
    "other columns": ("name,split\na,train\n", "line 2: sample=None"),
    "twice": ("sample,split\na,train\nb,train\na,test\n", "line 4: a is in train and again in test"),
    "unknown sample": ("sample,split\nz,train\n", "line 2: there is no sample 'z'"),
    "not there": (None, "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_a_wrong_split_file_is_refused(name: str, tmp_path: Path) -> None:
    text, message = SPLIT_FILES[name]
    if text is not None:
        (tmp_path / "split.csv").write_text(text)
    with pytest.raises(MisconfigurationException, match=message):
        read_split_file(str(tmp_path / "split.csv"), 2, ["a", "b"])


def test_a_split_file_names_samples_or_numbers_them(tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    file.write_text("sample,split\nb,train\na,val\n")
    assert read_split_file(str(file), 3, ["a", "b", "c"]) == {"train": [1], "val": [0], "test": []}
    file.write_text("sample,split\n2,train\n0,test\n")
    assert read_split_file(str(file), 3, None) == {"train": [2], "val": [], "test": [0]}


def test_means_over_folds_survive_a_fold_that_diverged(tmp_path: Path) -> None:
    from utils.cross_validation import _summarize

    found = _summarize([{"val_r2": float("nan"), "val_mae": 1.0}, {"val_r2": 1.0, "val_mae": 3.0}], [], tmp_path)
    assert found["val_mae"] == 2.0 and found["val_mae_std"] == pytest.approx(2**0.5)
    assert (tmp_path / "folds.csv").read_text().splitlines()[1].startswith("0,1.0,nan")

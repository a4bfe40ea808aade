"""Splits of samples into disjoint parts: by shares or folds (stratified, seeded, groups kept whole), or from a file."""

from __future__ import annotations

import csv
import random
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from engine import MisconfigurationException

# Share of the samples that a dataset without a validation or test split gives to each.
DEFAULT_FRACTION = 0.1


def split(
    count: int,
    shares: Sequence[float],
    seed: int,
    classes: Sequence[int] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Deal samples out to parts.

    Groups (or single samples) are dealt in random order, large groups first, each to the part that lacks most of its
    classes. Without groups, the number of samples of every class in every part is then within one of its share.

    Args:
        count: Number of samples.
        shares: Share of each part; they add up to 1. Equal shares make folds.
        seed: The same seed gives the same parts.
        classes: Class of each sample, to be spread over the parts alike.
        groups: Group of each sample; all samples of a group go to the same part.

    Returns:
        For each part the indices of its samples, ascending; every sample is in exactly one part.
    """
    kinds, labels = np.unique(np.zeros(count, int) if classes is None else np.asarray(classes), return_inverse=True)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist():
        members[index if groups is None else groups[index]].append(index)
    totals = np.bincount(labels, minlength=len(kinds))
    # What each part still lacks of each class.
    lacking = np.outer(shares, totals)
    parts: list[list[int]] = [[] for _ in shares]
    for group in sorted(members.values(), key=len, reverse=True):
        has = np.bincount(labels[group], minlength=len(kinds))
        need, whole = lacking / totals @ has, has / totals @ has
        if need.max() < whole - 1e-9:
            # No part lacks all of it: sizes decide, so that rounding down every class leaves no part too small.
            need = np.where(need > 0, lacking.sum(axis=1), -np.inf)
        chosen = int(need.argmax())
        lacking[chosen] -= has
        parts[chosen].extend(group)
    return [sorted(part) for part in parts]


def read_split_file(path: str, count: int, names: Sequence[str] | None) -> dict[str, list[int]]:
    """Read which sample belongs to which split.

    Args:
        path: CSV file with the columns `sample` (its name or, in a dataset without names, its number from 0) and
            `split` ("train", "val" or "test"). Samples that it does not list are left out.
        count: Number of samples.
        names: Name of each sample, where the dataset has names.

    Raises:
        MisconfigurationException: The file cannot be read, or a line names an unknown sample or split, or one again.
    """
    where = {name: index for index, name in enumerate(names or map(str, range(count)))}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    seen: dict[str, str] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise MisconfigurationException(
            f"split_file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    for number, row in enumerate(rows, start=2):
        sample, part = row.get("sample"), row.get("split")
        if sample is None or part not in parts:
            raise MisconfigurationException(
                f"split_file {path}, line {number}: sample={sample}, split={part}; the columns are sample and split, "
                "the splits train, val and test"
            )
        if sample in seen:
            raise MisconfigurationException(
                f"split_file {path}, line {number}: {sample} is in {seen[sample]} and again in {part}; name it once"
            )
        if sample not in where:
            raise MisconfigurationException(f"split_file {path}, line {number}: there is no sample {sample!r}")
        seen[sample] = part
        parts[part].append(where[sample])
    return {name: sorted(part) for name, part in parts.items()}


def check_options(options: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
    """Check those arguments of DInterface that say how to split.

    Args:
        options: All its arguments.
        names: Names of the datasets of each split.

    Raises:
        MisconfigurationException: One is out of range, or two contradict each other.
    """
    folds, fold, by_file = options["num_folds"], options["fold"], options["split_file"] is not None
    fractions = {name: options[name] for name in ("val_fraction", "test_fraction") if options[name] is not None}
    trained = names["train"][0]
    demands = [
        (0 <= options["split_seed"] < 2**63, f"split_seed={options['split_seed']}; give a whole number from 0"),
        *[(0 < share < 1, f"{name}={share}; give a share between 0 and 1") for name, share in fractions.items()],
        (sum(fractions.values()) < 1, f"{fractions} leave no samples to train on; give smaller shares"),
        *[(len(set(n)) == len(n), f"{split}_datasets {', '.join(n)}: name each once") for split, n in names.items()],
        ((fold is None) == (folds is None), f"num_folds={folds}, fold={fold}; give both or neither"),
        (folds is None or folds >= 2, f"num_folds={folds}; give 2 or more"),
        (
            fold is None or (fold != "all" and 0 <= fold < (folds or 0)),
            f"fold={fold}; give a number from 0 to {(folds or 0) - 1}, or all",
        ),
        (folds is None or trained in names["val"], f"num_folds validates on {trained}; leave out val_datasets"),
        (folds is None or not by_file, "num_folds and split_file both split the samples; give one of them"),
        (folds is None or "val_fraction" not in fractions, "num_folds replaces val_fraction; give one of them"),
        (not by_file or not fractions, "split_file and fractions both split the samples; give one of them"),
    ]
    for right, fault in demands:
        if not right:
            raise MisconfigurationException(fault)


def carve(pool: list[Dataset[Any]], carved: Sequence[str], options: Mapping[str, Any]) -> dict[str, Dataset[Any]]:
    """Split the samples of one dataset into "train" and what is carved out of it: "val", "test" or both.

    Args:
        pool: Splits of the dataset that are thrown together, "train" first.
        carved: What to carve out.
        options: The arguments of DInterface that say how: split_file, or split_seed with fractions or num_folds.

    Returns:
        The parts. Training samples are augmented as those of the first of the pool, the others are not.

    Raises:
        MisconfigurationException: The split file is wrong, or there are fewer samples (or groups) than folds.
    """
    samples = _joined(pool)
    everything = list(range(len(samples)))  # type: ignore[arg-type]
    if options["split_file"] is not None:
        parts = read_split_file(options["split_file"], len(everything), per_sample(samples, "names"))
    else:
        shares = {part: options[f"{part}_fraction"] or DEFAULT_FRACTION for part in carved}
        folds = options["num_folds"]
        parts = {"train": everything}
        if "test" in carved:
            parts["train"], parts["test"] = _split(samples, everything, [1 - shares["test"], shares["test"]], options)
        if folds:
            dealt = _split(samples, parts["train"], [1 / folds] * min(folds, len(everything) + 1), options)
            if not all(dealt):
                empty = dealt.count([]) + folds - len(dealt)
                raise MisconfigurationException(f"num_folds={folds} leaves {empty} folds without samples; give fewer")
            parts["val"] = dealt.pop(options["fold"])
            parts["train"] = sorted(index for fold in dealt for index in fold)
        elif "val" in carved:
            share = shares["val"] / (1 - shares.get("test", 0))
            parts["train"], parts["val"] = _split(samples, parts["train"], [1 - share, share], options)
    augment = getattr(pool[0], "augment", None)
    training = _joined([_with_augment(source, augment) for source in pool])
    judged = plain(samples)
    return {part: Subset(training if part == "train" else judged, indices) for part, indices in parts.items()}


def _joined(pool: list[Dataset[Any]]) -> Dataset[Any]:
    # A dataset alone can still read whole batches.
    return ConcatDataset(pool) if len(pool) > 1 else pool[0]


def _split(
    samples: Dataset[Any], chosen: list[int], shares: list[float], options: Mapping[str, Any]
) -> list[list[int]]:
    subset = Subset(samples, chosen)
    classes, groups = class_per_sample(subset), per_sample(subset, "groups")
    parts = split(len(chosen), shares, options["split_seed"], classes, groups)
    return [[chosen[index] for index in part] for part in parts]


def plain(dataset: Dataset[Any]) -> Dataset[Any]:
    """A shallow copy that does not augment, if the dataset has the attribute `augment`."""
    if isinstance(dataset, Subset):
        return Subset(plain(dataset.dataset), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([plain(part) for part in dataset.datasets])
    return _with_augment(dataset, False)


def _with_augment(dataset: Dataset[Any], augment: bool | None) -> Dataset[Any]:
    if augment is None or not hasattr(dataset, "augment"):
        return dataset
    copied = copy(dataset)
    copied.augment = augment
    return copied


@contextmanager
def same_randomness() -> Iterator[None]:
    """Samples that are looked at within do not change what is drawn at random afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    """The dataset that a subset, or the first part of several, comes from."""
    if isinstance(dataset, Subset):
        return innermost(dataset.dataset)
    return innermost(dataset.datasets[0]) if isinstance(dataset, ConcatDataset) else dataset


def per_sample(dataset: Dataset[Any], attribute: str) -> list[Any] | None:
    """An attribute with an item for every sample, such as `targets`, looked up through subsets; None if it lacks."""
    if isinstance(dataset, Subset):
        values = per_sample(dataset.dataset, attribute)
        return None if values is None else [values[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [per_sample(part, attribute) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]
    values = getattr(dataset, attribute, None)
    return None if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def class_per_sample(dataset: Dataset[Any]) -> list[int] | None:
    """Class of every sample; None if the dataset does not tell, or if its targets are no classes."""
    targets = per_sample(dataset, "targets")
    return targets if targets and all(isinstance(target, int) for target in targets) else None


def check_sets(sets: Mapping[str, Mapping[str, Dataset[Any]]]) -> None:
    """Check that no set is empty, that labels are in range, and that training, validation and test share no samples.

    Args:
        sets: The sets by split and name.

    Raises:
        MisconfigurationException: The first fault found.
    """
    apart = [(split, name) for split in ("train", "val", "test") for name in sets.get(split, {})]
    for split, named in sets.items():
        for name, dataset in named.items():
            if not hasattr(dataset, "__len__"):
                raise MisconfigurationException(
                    f"dataset {name} has no length; give it __len__, or make its loaders in DInterface"
                )
            if not len(dataset):
                raise MisconfigurationException(
                    f"dataset {name}: split {split} is empty; check its files, or how it is split"
                )
            num_classes, classes = getattr(innermost(dataset), "num_classes", None), class_per_sample(dataset)
            if num_classes is not None and classes and not 0 <= min(classes) <= max(classes) < num_classes:
                raise MisconfigurationException(
                    f"dataset {name}: split {split} has classes from {min(classes)} to {max(classes)}, but its "
                    f"num_classes is {num_classes}: classes are numbered from 0 to {num_classes - 1}"
                )
    for (split, name), (other_split, other_name) in combinations(apart, 2):
        if split != other_split:
            shared = _shared(sets[split][name], sets[other_split][other_name], same_dataset=name == other_name)
            if shared:
                raise MisconfigurationException(
                    f"split {split} of {name} and split {other_split} of {other_name} share {shared}; every sample "
                    "belongs to one split only"
                )


def _shared(a: Dataset[Any], b: Dataset[Any], same_dataset: bool) -> str:
    """What shows that two sets share samples; empty if nothing.

    Names are compared where a dataset has them. Otherwise sets of one length whose first, middle and last samples are
    equal are taken for the same: a dataset that ignores which split it was asked for.
    """
    names = per_sample(a, "names"), per_sample(b, "names")
    if same_dataset and names[0] is not None and names[1] is not None:
        common = set(names[0]) & set(names[1])
        return f"{len(common)} samples, {min(common)} among them" if common else ""
    count = len(a)  # type: ignore[arg-type]
    if count < 2 or count != len(b) or isinstance(a, Subset) and isinstance(b, Subset):  # type: ignore[arg-type]
        return ""
    a, b = plain(a), plain(b)
    return "all samples" if all(_equal(a[index], b[index]) for index in {0, count // 2, count - 1}) else ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(np.all(a == b))


def fingerprint(dataset: Dataset[Any]) -> str:
    """Number of samples and a checksum of up to 16 of them, of their order and of all targets."""
    count, source = len(dataset), plain(dataset)  # type: ignore[arg-type]
    with same_randomness():
        samples = [source[index] for index in range(0, count, max(count // 16, 1))]
    checksum = zlib.crc32(repr(per_sample(dataset, "targets")).encode())
    for value in _leaves(samples):
        content = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        checksum = zlib.crc32(content, checksum)
    return f"{count} samples, {checksum:08x}"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value

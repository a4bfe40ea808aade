"""Splits of samples into disjoint parts: by shares or folds (stratified, seeded, groups kept whole), or from a file."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from engine import MisconfigurationException
from utils.samples import class_per_sample, per_sample, plain, with_augment

# Share of the samples that a dataset without a validation or test split gives to each.
DEFAULT_FRACTION = 0.1
# The words by which folders and tables name the splits, in any case.
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test", "predict": "predict"}


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
    labels = [0] * count if classes is None else np.asarray(classes).tolist()
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist():
        members[index if groups is None else groups[index]].append(index)
    totals = Counter(labels)
    # What each part still lacks of each class.
    lacking = [{kind: share * total for kind, total in totals.items()} for share in shares]
    parts: list[list[int]] = [[] for _ in shares]
    for group in sorted(members.values(), key=len, reverse=True):
        has = Counter([labels[index] for index in group]) if len(group) > 1 else {labels[group[0]]: 1}
        weights = [(kind, number / totals[kind]) for kind, number in has.items()]
        need = [sum([own[kind] * weight for kind, weight in weights]) for own in lacking]
        if max(need) < sum([has[kind] * weight for kind, weight in weights]) - 1e-9:
            # No part lacks all of it: sizes decide, so that rounding down every class leaves no part too small.
            sizes = [math.fsum(own.values()) for own in lacking]
            need = [size if some > 0 else -math.inf for some, size in zip(need, sizes, strict=True)]
        chosen = need.index(max(need))
        for kind, number in has.items():
            lacking[chosen][kind] -= number
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
    training = _joined([with_augment(source, augment) for source in pool])
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
    if classes is not None and len(set(classes)) > len(classes) / 2:
        # These are values rather than classes: there is nothing to spread.
        classes = None
    parts = split(len(chosen), shares, options["split_seed"], classes, groups)
    return [[chosen[index] for index in part] for part in parts]

"""Splits of a dataset into disjoint parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch


def stratified_split(labels: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Split indices so that every class is spread over the parts by the same fractions.

    Args:
        labels: Class of each sample.
        fractions: Share of each part; they add up to 1.
        seed: The same seed gives the same parts.

    Returns:
        For each part the indices of its samples, ascending; every sample is in exactly one part.
    """
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    parts: list[list[int]] = [[] for _ in fractions]
    for label in sorted(by_class):
        members = by_class[label]
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        share = 0.0
        start = 0
        for part, fraction in zip(parts, fractions, strict=True):
            share += fraction
            end = round(share * len(members))
            part.extend(shuffled[start:end])
            start = end
    return [sorted(part) for part in parts]

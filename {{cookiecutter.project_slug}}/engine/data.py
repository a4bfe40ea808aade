"""Loaders: the order of samples, and what a loader must be told before an epoch.

The order of training samples is a function of (seed, epoch), not state: see `EpochSampler`. Loaders draw their
workers' seeds from a generator of their own, so that reading data never moves the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks
from engine.seed import mix

# A loader without length: an iterable dataset, or any iterable.
UNKNOWN = math.inf


class EpochSampler(Sampler[int]):
    """Indices of one process in one epoch, as a function of (seed, epoch).

    Process r of w takes samples r, r + w, r + 2w, ... of the epoch's order. When training, the last `size % w`
    samples of the order are left out, so that all processes run the same number of batches; with shuffling these
    are others in every epoch. When evaluating, every sample is taken exactly once.

    Args:
        size: Number of samples in the dataset.
        shuffle: Whether the order is a random permutation, or the dataset's own order.
        seed: Seed of the run.
        even: Give all processes the same number of samples (training).
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int, even: bool) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.taken = size - size % self.world if even else size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order the next `iter` gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rank, self.taken, self.world))
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        return iter(order[self.rank : self.taken : self.world].tolist())

    def __len__(self) -> int:
        return len(range(self.rank, self.taken, self.world))


class Loaders:
    """The loaders of one stage: each kind is requested, prepared and counted once, when first needed.

    Args:
        sources: Objects with loader hooks, in the order in which they are asked.
        given: Loaders that were handed over directly, by kind ("train", "val", "test", "predict").
        limits: `limit_*_batches` by kind.
        share: Whether to share samples among processes.
    """

    def __init__(
        self, sources: list[DataHooks], given: dict[str, Any], limits: dict[str, int | float], *, share: bool
    ) -> None:
        self.seed = 0
        self._sources, self._given, self._limits, self._share = sources, given, limits, share
        self._ready: dict[str, tuple[list[Any], list[int | float]]] = {}

    def get(self, kind: str) -> tuple[list[Any], list[int | float]]:
        """The loaders of a kind, and how many batches of each to run."""
        if kind not in self._ready:
            prepared = [
                prepare_loader(loader, seed=self.seed, training=kind == "train", share=self._share)
                for loader in self._request(kind)
            ]
            name = f"limit_{kind}_batches"
            self._ready[kind] = (prepared, [count_batches(p, self._limits[kind], name) for p in prepared])
        return self._ready[kind]

    def train(self) -> tuple[Any, int | float]:
        """The train loader and its number of batches."""
        loaders, counts = self.get("train")
        if len(loaders) != 1:
            raise MisconfigurationException(
                f"{len(loaders)} train loaders were given; give one, to fit or as the train_dataloader hook"
            )
        if counts[0] == 0 and self._limits["train"]:
            raise MisconfigurationException("the train loader has no batch; is batch_size too large for drop_last?")
        return loaders[0], counts[0]

    def close(self) -> None:
        """End workers that were to persist; if the garbage collector finds them, each may hold it up for seconds."""
        for loaders, _ in self._ready.values():
            for loader in loaders:
                if isinstance(loader, DataLoader):
                    loader._iterator = None

    def _request(self, kind: str) -> list[Any]:
        loaders = self._given.get(kind)
        for source in self._sources:
            if loaders is None:
                loaders = getattr(source, f"{kind}_dataloader")()
        if isinstance(loaders, Mapping):
            raise MisconfigurationException(f"the {kind} loaders were given as a {type(loaders).__name__}; give a list")
        if loaders is None:
            return []
        return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def prepare_loader(loader: Any, *, seed: int, training: bool, share: bool = True) -> Any:
    """The same loader with our sampler and a generator of its own.

    Only a plain `DataLoader` with torch's default samplers is rebuilt, from its public attributes. Anything else (a
    subclass, a sampler of the user's, an iterable dataset) is used as it is.

    Args:
        loader: What a `*_dataloader` hook returned.
        seed: Seed of the run.
        training: Whether processes must run equally many batches.
        share: Share samples among processes; otherwise a loader is left alone when there are several.

    Raises:
        MisconfigurationException: There are fewer samples than processes, or none to train on.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if not _has_default_sampler(loader) or (distributed.world_size() > 1 and not share):
        if distributed.world_size() > 1 and not hasattr(loader.sampler, "num_replicas"):
            distributed.rank_zero_warn("a loader with a sampler of its own gives every process all its samples")
        if loader.generator is None:
            loader.generator = torch.Generator()
        return loader
    shuffle = isinstance(loader.sampler, RandomSampler)
    sampler = EpochSampler(len(loader.dataset), shuffle=shuffle, seed=seed, even=training)  # type: ignore[arg-type]
    if training and not sampler.size:
        raise MisconfigurationException("the training set is empty; check the folder, or the arguments, of the data")
    if 0 < sampler.size < sampler.world:
        raise MisconfigurationException(
            f"a dataset of {sampler.size} samples cannot be shared by {sampler.world} processes; start fewer"
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


def _has_default_sampler(loader: DataLoader[Any]) -> bool:
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    return plain and type(loader.batch_sampler) is BatchSampler


def start_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Tell a loader, its dataset and its samplers which epoch comes next."""
    if isinstance(loader, DataLoader) and isinstance(loader.generator, torch.Generator):
        loader.generator.manual_seed(mix(seed, epoch, 1, distributed.rank()))
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, EpochSampler):
        # A run that goes on takes its seed from the checkpoint, perhaps after the loader was made.
        loader.sampler.seed = seed
    for name in ("sampler", "batch_sampler", "dataset"):
        set_epoch = getattr(getattr(loader, name, None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def count_batches(loader: Any, limit: int | float, name: str) -> int | float:
    """Number of batches to run: a whole limit counts batches, one from 0.0 to 1.0 is a share of them.

    Returns:
        A whole number, or `UNKNOWN` for a loader without length and without a whole limit.

    Raises:
        MisconfigurationException: A share of an unknown length, or a share so small that nothing is left.
    """
    length = _length(loader)
    if isinstance(limit, int):
        return min(limit, length)
    if limit == 1.0 or limit == 0.0:
        return length if limit else 0
    if length is UNKNOWN:
        raise MisconfigurationException(f"{name}={limit} of a loader without length; give a whole number of batches")
    if length and int(length * limit) == 0:
        raise MisconfigurationException(f"{name}={limit} of {length} batches is none; give a larger share or a number")
    return int(length * limit)


def batches(loader: Iterable[Any], count: int | float) -> Iterator[tuple[int, Any, bool]]:
    """Yield (number, batch, whether it is the last) for the first `count` batches.

    A loader without exact length is read one batch ahead, since only its end says which batch was the last.
    """
    iterator = enumerate(loader if count == UNKNOWN else islice(loader, int(count)))
    # The length of an iterable dataset is an estimate.
    if _length(loader) != UNKNOWN and not isinstance(getattr(loader, "dataset", None), IterableDataset):
        for index, batch in iterator:
            yield index, batch, index + 1 == count
        return
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield *current, following is None
        current = following


def _length(loader: Any) -> int | float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return UNKNOWN

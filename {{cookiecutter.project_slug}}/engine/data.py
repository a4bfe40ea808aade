"""Loaders: getting them ready, and what they must be told before an epoch.

Order and randomness of samples are those of `engine.samples`; reading data never moves the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks
from engine.samples import EpochSampler, SeededDataset
from engine.seed import mix

# A loader without length: an iterable dataset, or any iterable.
UNKNOWN = math.inf
# What a loader that is rebuilt has in common with the one that was given.
KEPT = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
KEPT += ["prefetch_factor", "persistent_workers", "in_order"]


class LoaderSet(NamedTuple):
    """The loaders of one kind, prepared.

    Attributes:
        loaders: The loaders.
        counts: Batches to run of each; `UNKNOWN` for all of a loader without length.
        names: What the sets are called, if there are several and they were given as a mapping; otherwise empty.
        tags: What is put behind the names of values that are logged in steps; None for a single loader.
    """

    loaders: list[Any]
    counts: list[int | float]
    names: list[str]
    tags: list[str | None]


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
        self._ready: dict[str, LoaderSet] = {}

    def get(self, kind: str) -> LoaderSet:
        """The loaders of a kind, and how many batches of each to run."""
        if kind not in self._ready:
            loaders, names = self._request(kind)
            training, name = kind == "train", f"limit_{kind}_batches"
            prepared = [prepare_loader(p, seed=self.seed, training=training, share=self._share) for p in loaders]
            counts = [count_batches(p, self._limits[kind], name) for p in prepared]
            tags: list[str | None] = [*names] or [
                f"dataloader_idx_{n}" if len(loaders) > 1 else None for n in range(len(loaders))
            ]
            self._ready[kind] = LoaderSet(prepared, counts, names, tags)
        return self._ready[kind]

    def train(self) -> tuple[Any, int | float]:
        """The train loader and its number of batches."""
        loaders, counts, *_ = self.get("train")
        if len(loaders) != 1:
            raise MisconfigurationException(f"{len(loaders)} train loaders were given; give one, to fit or as its hook")
        if counts[0] == 0 and self._limits["train"]:
            raise MisconfigurationException("the train loader has no batch; is batch_size too large for drop_last?")
        return loaders[0], counts[0]

    def close(self) -> None:
        """End workers that were to persist; if the garbage collector finds them, each may hold it up for seconds."""
        for ready in self._ready.values():
            for loader in ready.loaders:
                if isinstance(loader, DataLoader):
                    loader._iterator = None

    def _request(self, kind: str) -> tuple[list[Any], list[str]]:
        loaders = self._given.get(kind)
        for source in self._sources:
            if loaders is None:
                loaders = getattr(source, f"{kind}_dataloader")()
        if isinstance(loaders, Mapping):
            _check_names(kind, loaders)
            return list(loaders.values()), list(loaders) if len(loaders) > 1 else []
        if loaders is None:
            return [], []
        return list(loaders) if isinstance(loaders, list | tuple) else [loaders], []


def _check_names(kind: str, loaders: Mapping[Any, Any]) -> None:
    if kind == "train":
        raise MisconfigurationException(f"the train loaders were given as a {type(loaders).__name__}; give one loader")
    for name in loaders:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise MisconfigurationException(f"a {kind} loader has the name {name!r}; give a text without '/'")


def prepare_loader(loader: Any, *, seed: int, training: bool, share: bool = True) -> Any:
    """The same loader with our order, randomness of samples, and a generator of its own.

    A plain `DataLoader` of a map dataset is rebuilt with a `SeededDataset`, and with an `EpochSampler` for torch's
    default samplers and its WeightedRandomSampler. Subclasses and iterable datasets are used as they are.

    Args:
        loader: What a `*_dataloader` hook returned.
        seed: Seed of the run.
        training: Whether processes must run equally many batches.
        share: Share samples among processes; otherwise samplers are left alone when there are several.

    Raises:
        MisconfigurationException: There are fewer samples than processes, or none to train on.
    """
    if not isinstance(loader, DataLoader):
        return loader
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    several = distributed.world_size() > 1
    own = _epoch_sampler(loader, seed, training) if plain and (share or not several) else None
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if own is None and several and not hasattr(sampler, "num_replicas"):
        distributed.rank_zero_warn("a loader with a sampler of its own gives every process all its samples")
    if not plain:
        loader.generator = loader.generator or torch.Generator()
        return loader
    batches = loader.batch_sampler
    order: dict[str, Any] = {"batch_sampler": batches}
    if batches is None or type(batches) is BatchSampler:
        order = {"sampler": sampler if own is None else own, "batch_size": getattr(batches, "batch_size", None)}
        order["drop_last"] = getattr(batches, "drop_last", False)
    return DataLoader(
        SeededDataset(loader.dataset, seed, workers=loader.num_workers > 0),
        generator=(loader.generator if own is None else None) or torch.Generator(),
        **order,
        **{name: getattr(loader, name) for name in KEPT},
    )


def _epoch_sampler(loader: DataLoader[Any], seed: int, training: bool) -> EpochSampler | None:
    """Our sampler in place of the loader's, if that is one of torch's whose rule we know."""
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    given = loader.batch_sampler.sampler
    weighted = given if type(given) is WeightedRandomSampler else None
    permutes = type(given) is RandomSampler and not given.replacement
    whole = (permutes or type(given) is SequentialSampler) and len(given) == len(loader.dataset)  # type: ignore[arg-type]
    if not whole and weighted is None:
        return None
    sampler = EpochSampler(len(given), shuffle=permutes, seed=seed, even=training, weighted=weighted)  # type: ignore[arg-type]
    if training and not sampler.size:
        raise MisconfigurationException("the training set is empty; check the folder, or the arguments, of the data")
    if 0 < sampler.size < sampler.world:
        raise MisconfigurationException(f"only {sampler.size} samples for {sampler.world} processes; start fewer")
    return sampler


def start_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Tell a loader, its dataset and its samplers which epoch comes next."""
    if isinstance(loader, DataLoader):
        if isinstance(loader.generator, torch.Generator):
            loader.generator.manual_seed(mix(seed, epoch, 1, distributed.rank()))
        # A run that goes on takes its seed from the checkpoint, perhaps after the loader was made.
        if isinstance(loader.sampler, EpochSampler):
            loader.sampler.seed = seed
        if isinstance(loader.dataset, SeededDataset):
            loader.dataset.start_epoch(seed, epoch)
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

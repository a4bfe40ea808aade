"""Loaders: getting them ready, and what they must be told before an epoch.

Order and randomness of samples are those of `engine.samples`; reading data never moves the global random state.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_convert,
)

from engine import distributed
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks, is_overridden
from engine.reading import UNKNOWN, Reader, length
from engine.samples import EpochSampler, PreparedLoader, SeededDataset

# What a loader that is rebuilt has in common with the one that was given.
KEPT = ["num_workers", "pin_memory", "timeout", "multiprocessing_context"]
KEPT += ["prefetch_factor", "persistent_workers", "in_order"]


class LoaderSet(NamedTuple):
    """The loaders of one kind, prepared.

    Attributes:
        readers: The loaders, ready to be read.
        counts: Batches to run of each; `UNKNOWN` for all of a loader without length.
        names: What the sets are called, if there are several and they were given as a mapping; otherwise empty.
        tags: What is put behind the names of values that are logged in steps; None for a single loader.
    """

    readers: list[Reader]
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
        ordered: Whether to train in the dataset's own order, too: on the same batches in every epoch.
    """

    def __init__(
        self,
        sources: list[DataHooks],
        given: dict[str, Any],
        limits: dict[str, int | float],
        *,
        share: bool,
        ordered: bool = False,
    ) -> None:
        self.seed = 0
        self._sources, self._given, self._limits = sources, given, limits
        self._share, self._ordered = share, ordered
        self._ready: dict[str, LoaderSet] = {}

    def offers(self, kind: str) -> bool:
        """Whether there are loaders of a kind, or a hook that may give some; asks no hook."""
        hook = f"{kind}_dataloader"
        return self._given.get(kind) is not None or any(is_overridden(s, hook, DataHooks) for s in self._sources)

    def request_again(self, *kinds: str) -> None:
        """Ask the hooks for loaders anew when they are next needed."""
        for kind in kinds:
            self.close(kind)
            self._ready.pop(kind, None)

    def get(self, kind: str) -> LoaderSet:
        """The loaders of a kind, and how many batches of each to run."""
        if kind not in self._ready:
            loaders, names = self._request(kind)
            training, name = kind == "train", f"limit_{kind}_batches"
            ordered = self._ordered and kind in ("train", "val")
            options: dict[str, Any] = {"seed": self.seed, "training": training, "share": self._share}
            prepared = [prepare_loader(loader, **options, ordered=ordered) for loader in loaders]
            counts = [count_batches(p, self._limits[kind], name) for p in prepared]
            numbered = [f"dataloader_idx_{n}" for n in range(len(loaders))]
            tags: list[str | None] = [*(names or numbered)] if len(loaders) > 1 else [None] * len(loaders)
            readers = [Reader(p, count, together=training) for p, count in zip(prepared, counts, strict=True)]
            self._ready[kind] = LoaderSet(readers, counts, names, tags)
        return self._ready[kind]

    def train(self) -> Reader:
        """The train loader."""
        readers, counts, *_ = self.get("train")
        if len(readers) != 1:
            raise MisconfigurationException(f"{len(readers)} train loaders were given; give one, to fit or as its hook")
        if counts[0] == 0 and self._limits["train"]:
            raise MisconfigurationException("the train loader has no batch; is batch_size too large for drop_last?")
        return readers[0]

    def check_lengths(self) -> None:
        """Refuse train loaders of which one process has more batches than another, for which it would wait forever.

        Those without length end together (`engine.reading`).

        Raises:
            MisconfigurationException: There are such; in every process, all of which must call this.
        """
        counts = distributed.all_gather(self.train().count)
        if len({*counts}) > 1:
            raise MisconfigurationException(
                f"the train loaders of the {len(counts)} processes have {', '.join(map(str, counts))} batches; give "
                f"every process as many, or limit_train_batches={min(counts)}"
            )

    def close(self, *kinds: str) -> None:
        """End workers, of some kinds or of all; if the garbage collector finds one, it may be held up for seconds."""
        for kind in kinds or self._ready:
            for reader in self._ready[kind].readers if kind in self._ready else ():
                reader.close()

    def _request(self, kind: str) -> tuple[list[Any], list[str]]:
        loaders: Any = self._given.get(kind)
        for source in self._sources:
            if loaders is None:
                loaders = getattr(source, f"{kind}_dataloader")()
        if hasattr(loaders, "flattened") and hasattr(loaders, "iterables"):
            # Lightning's CombinedLoader.
            if kind == "train" or getattr(loaders, "_mode", "") != "sequential":
                raise MisconfigurationException(
                    f"the {kind} loader is a {type(loaders).__name__}; to train on several sets, give one loader "
                    "of a dataset whose samples have a part of each, and to evaluate, loaders in a list or by name"
                )
            loaders = loaders.iterables
        if isinstance(loaders, Mapping):
            _check_names(kind, loaders)
            return list(loaders.values()), list(loaders) if len(loaders) > 1 else []
        if loaders is None:
            return [], []
        return list(loaders) if isinstance(loaders, list | tuple) else [loaders], []


def _check_names(kind: str, loaders: Mapping[Any, Any]) -> None:
    if kind == "train":
        raise MisconfigurationException(
            f"the train loaders were given as a {type(loaders).__name__}; give one loader, of a dataset whose samples "
            "have a part of each"
        )
    for name in loaders:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise MisconfigurationException(f"a {kind} loader has the name {name!r}; give a text without '/'")


def prepare_loader(loader: Any, *, seed: int, training: bool, share: bool = True, ordered: bool = False) -> Any:
    """The same loader with our order, randomness of samples, and a generator of its own.

    A plain `DataLoader` of a map dataset is rebuilt with a `SeededDataset`, and with an `EpochSampler` for torch's
    default samplers and its WeightedRandomSampler. Subclasses and iterable datasets are used as they are, but for
    workers that live on when a signal reaches the whole process group.

    Args:
        loader: What a `*_dataloader` hook returned.
        seed: Seed of the run.
        training: Whether processes must run equally many batches.
        share: Share samples among processes; otherwise samplers are left alone when there are several.
        ordered: Take the dataset's own order in place of a random one.

    Raises:
        MisconfigurationException: There are fewer samples than processes, or none to train on.
    """
    if not isinstance(loader, DataLoader):
        return loader
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    several = distributed.world_size() > 1
    own = _epoch_sampler(loader, seed, training, ordered) if plain and (share or not several) else None
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if own is None and several and not hasattr(sampler, "num_replicas"):
        distributed.rank_zero_warn("a loader with a sampler of its own gives every process all its samples")
    if not plain:
        loader.generator = loader.generator or torch.Generator()
        if loader.num_workers and getattr(loader.worker_init_fn, "func", None) is not _init_worker:
            loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
        return loader
    batches = loader.batch_sampler
    order: dict[str, Any] = {"batch_sampler": batches}
    if batches is None or type(batches) is BatchSampler:
        order = {"sampler": sampler if own is None else own, "batch_size": getattr(batches, "batch_size", None)}
        order["drop_last"] = getattr(batches, "drop_last", False)
    # Without batches, `collate_fn` converts single samples; torch's own draws nothing.
    collate = loader.collate_fn if batches is not None else None
    convert = loader.collate_fn if batches is None and loader.collate_fn is not default_convert else None
    return PreparedLoader(
        SeededDataset(loader.dataset, seed, workers=loader.num_workers > 0, collate=collate, convert=convert),
        collate_fn=loader.collate_fn if collate is convert else _as_is,
        generator=(loader.generator if own is None else None) or torch.Generator(),
        worker_init_fn=partial(_init_worker, loader.worker_init_fn) if loader.num_workers else None,
        **order,
        **{name: getattr(loader, name) for name in KEPT},
    )


def _as_is(batch: Any) -> Any:
    return batch


def _init_worker(own: Callable[[int], None] | None, worker_id: int) -> None:
    """Ctrl-C, and the signals of a cluster, reach workers too: they go on, since the step is to be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever ends a worker that hangs asks twice: when its loader is closed, and when the process exits.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if own is not None:
        own(worker_id)


def _epoch_sampler(loader: DataLoader[Any], seed: int, training: bool, ordered: bool) -> EpochSampler | None:
    """Our sampler in place of the loader's, if that is one of torch's whose rule we know."""
    # Without batches, its samples are what is run in a step.
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return None
    given = getattr(loader.batch_sampler, "sampler", loader.sampler)
    weighted = given if type(given) is WeightedRandomSampler else None
    permutes = type(given) is RandomSampler and not given.replacement
    whole = (permutes or type(given) is SequentialSampler) and len(given) == len(loader.dataset)  # type: ignore[arg-type]
    if not whole and weighted is None:
        return None
    sampler = EpochSampler(len(given), shuffle=permutes and not ordered, seed=seed, even=training, weighted=weighted)  # type: ignore[arg-type]
    if training and not sampler.size:
        raise MisconfigurationException("the training set is empty; check the folder, or the arguments, of the data")
    if 0 < sampler.size < sampler.world:
        raise MisconfigurationException(f"only {sampler.size} samples for {sampler.world} processes; start fewer")
    return sampler


def count_batches(loader: Any, limit: int | float, name: str) -> int | float:
    """Number of batches to run: a whole limit counts batches, one from 0.0 to 1.0 is a share of them.

    Returns:
        A whole number, or `UNKNOWN` for a loader without length and without a whole limit.

    Raises:
        MisconfigurationException: A share of an unknown length, or a share so small that nothing is left.
    """
    batches = length(loader)
    if isinstance(limit, int):
        return min(limit, batches)
    if limit == 1.0 or limit == 0.0:
        return batches if limit else 0
    if batches is UNKNOWN:
        raise MisconfigurationException(f"{name}={limit} of a loader without length; give a whole number of batches")
    if batches and int(batches * limit) == 0:
        raise MisconfigurationException(f"{name}={limit} of {batches} batches is none; give a larger share or a number")
    return int(batches * limit)

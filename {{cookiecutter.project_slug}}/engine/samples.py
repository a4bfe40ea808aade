"""Samples: their order and the randomness behind each of them, as functions of (seed, epoch, index), not as state."""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    Dataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from engine import distributed
from engine.exceptions import LIBRARIES, explained
from engine.seed import OwnRandomness, mix, seed_cpu


class Draw(int):
    """An index drawn by weight; its place in the epoch's order tells it from the same index drawn again."""

    place: int

    def __new__(cls, index: int, place: int = 0) -> Draw:
        """The number `index`; without a place when it is unpickled, until its state is."""
        draw = super().__new__(cls, index)
        draw.place = place
        return draw


class EpochSampler(Sampler[int]):
    """Indices of one process in one epoch, as a function of (seed, epoch, samples that all processes have had).

    Process r of w takes samples r, r + w, r + 2w, ... of what is left of the epoch's order. When training, the last
    `left % w` samples of the order are left out, so that all processes run the same number of batches; with shuffling
    these are others in every epoch. w processes take w samples at a time, so that those left out are the same ones
    wherever w processes go on, and only other processes may leave out fewer or more. When evaluating, every sample of
    the order is taken exactly once.

    Args:
        size: Number of samples in an epoch's order.
        shuffle: Whether the order is a random permutation, or the dataset's own order.
        seed: Seed of the run.
        even: Give all processes the same number of samples (training).
        weighted: Draw the order with the weights, and the replacement, of this sampler instead.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int, even: bool, weighted: WeightedRandomSampler | None = None
    ) -> None:
        self.size, self.shuffle, self.weighted = size, shuffle, weighted
        self.seed, self.epoch = seed, 0
        self.rank, self.world, self.even = distributed.data_rank(), distributed.data_world_size(), even
        self.skipped = 0

    def set_epoch(self, epoch: int, skipped: int = 0) -> None:
        """Choose the epoch, from 0, whose order the next `iter` gives, without its first samples, of all processes."""
        self.epoch, self.skipped = epoch, skipped

    def mine(self, skipped: int) -> range:
        """Places in the order that this process takes, if the first ones are skipped."""
        left_out = (self.size - skipped) % self.world if self.even else 0
        return range(skipped + self.rank, self.size - left_out, self.world)

    def __iter__(self) -> Iterator[int]:
        places = self.mine(self.skipped)
        mine = slice(places.start, places.stop, places.step)
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        if self.weighted is not None:
            order = torch.multinomial(self.weighted.weights, self.size, self.weighted.replacement, generator=generator)
            return map(Draw, order[mine].tolist(), places)
        return iter(torch.randperm(self.size, generator=generator)[mine].tolist() if self.shuffle else places)

    def __len__(self) -> int:
        return len(self.mine(0))


# Whose samples are as they are: nothing behind them is drawn at random.
FIXED = (list, tuple, TensorDataset)


class Unreadable(NamedTuple):
    """Comes in place of a batch that a worker could not read: what happened, in a line and as a traceback."""

    line: str
    details: str


class SeededDataset(Dataset[Any]):
    """A map dataset in which the random numbers behind a sample are a function of (seed, epoch, index).

    Before each sample torch (on the CPU), `random` and NumPy's global generator are seeded, so that augmentation does
    not depend on the number of workers, on prefetching or on where a run was resumed. A dataset that brings
    `__getitems__` is read through it and seeded once, from the batch's first index: a function of the batch then, as
    is what `collate_fn` draws. In the main process the global generators are put back after each batch.

    Args:
        wrapped: The dataset; its attributes can be read and set here too.
        seed: Seed of the run.
        workers: Whether other processes read too.
        collate: Makes a batch of the samples that `__getitems__` has read.

    Raises:
        RuntimeError: A sample cannot be read; the message has its index. A worker returns `Unreadable` instead.
    """

    wrapped: Any
    _now: list[int]
    _clock: Tensor
    _reading: Any

    def __init__(
        self, wrapped: Any, seed: int, workers: bool = False, collate: Callable[[Any], Any] | None = None
    ) -> None:
        # Seed and epoch, and the same again for workers, which may outlive an epoch and see it in shared memory.
        clock = torch.tensor([seed, 0], device="cpu")
        if workers:
            clock.share_memory_()  # type: ignore[no-untyped-call]
        # A subset has `__getitems__`, whether its dataset has or not.
        by_batch = hasattr(innermost(wrapped), "__getitems__")
        fixed = type(innermost(wrapped)) in FIXED and collate in (None, default_collate)
        self.__dict__.update(wrapped=wrapped, _now=[seed, 0], _clock=clock, _by_batch=by_batch, _fixed=fixed)
        self.__dict__.update(_collate=collate, _reading=None)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Choose the random numbers of the samples read from now on."""
        self._now[:] = seed, epoch
        self._clock.copy_(torch.tensor([seed, epoch]))

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: Any) -> Any:
        return self._read([index], single=True)

    def __getitems__(self, indices: list[Any]) -> Any:
        return self._read(indices, single=False)

    def __getattr__(self, name: str) -> Any:
        # While an instance is unpickled or copied there is no `wrapped` yet.
        if name in ("wrapped", "_by_batch") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)

    def _read(self, indices: list[Any], single: bool) -> Any:
        in_worker = get_worker_info() is not None
        try:
            with nullcontext() if in_worker or self._fixed else OwnRandomness():
                stream = mix(*(self._clock.tolist() if in_worker else self._now), 2)
                samples = self._samples(stream, indices, by_batch=self._by_batch and not single)
                if single or self._collate is None:
                    return samples[0] if single else samples
                self.__dict__["_reading"] = None
                if self._collate is not default_collate:
                    _seed_sample(mix(stream, 3), next(iter(indices), 0))
                return self._collate(samples)
        except Exception as error:
            line = self._explain(error, indices)
            if in_worker:
                return Unreadable(line, traceback.format_exc())
            raise explained(RuntimeError(line)) from error

    def _samples(self, stream: int, indices: list[Any], by_batch: bool) -> Any:
        own, samples = self.__dict__, []
        own["_reading"] = None
        if by_batch:
            _seed_sample(stream, next(iter(indices), 0))
            return self.wrapped.__getitems__(indices)
        for index in indices:
            own["_reading"] = index
            if not self._fixed:
                _seed_sample(stream, index)
            samples.append(self.wrapped[index])
        return samples

    def _explain(self, error: Exception, indices: list[Any]) -> str:
        """Which sample, or which batch of samples, cannot be read, and why."""
        name, bad = type(innermost(self.wrapped)).__name__, self._reading
        for index in indices if bad is None else ():
            try:
                self.wrapped[index]
            except Exception as fault:
                error, bad = fault, index
                break
        numbers = ", ".join(str(_inner_index(self.wrapped, index)) for index in indices)
        what = f"sample {_inner_index(self.wrapped, bad)} of {name} cannot be read"
        what = f"samples {numbers} of {name} cannot be made a batch" if bad is None else what
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(p in f.filename for p in LIBRARIES)]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        return f"{what}: {type(error).__name__}: {error}{where}"


def innermost(dataset: Any) -> Any:
    """The dataset behind subsets."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _inner_index(dataset: Any, index: Any) -> Any:
    while type(dataset) is Subset:
        dataset, index = dataset.dataset, dataset.indices[index]
    return index


def _seed_sample(stream: int, index: Any) -> None:
    # A sampler of the user's may give keys of any type.
    number = index if isinstance(index, int) else zlib.crc32(repr(index).encode())
    seed_cpu(mix(stream, number, index.place if isinstance(index, Draw) else 0))

"""Samples: their order and the randomness behind each of them, as functions of (seed, epoch, index), not as state."""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from engine import distributed
from engine.exceptions import LIBRARIES, explained
from engine.seed import OwnRandomness, mix, seed_cpu

# Constants of splitmix64 (Steele et al. 2014), and what tells draws of the same index from each other.
STEP, PLACE = np.uint64(0x9E3779B97F4A7C15), 0xD1342543DE82EF95
SHIFTS = [(np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB))]


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


class Numbers:
    """Random numbers of samples that are read together: each has a sequence of its own, as in `sample_uniform`.

    Args:
        stream: What tells seed and epoch.
        indices: The samples.
    """

    def __init__(self, stream: int, indices: list[Any]) -> None:
        self.stream, self.indices, self.drawn = stream, indices, 0
        self.sequences: Any = None

    def next(self, columns: int) -> np.ndarray:
        """The next numbers of each sample, float64 of shape (samples, columns) from 0 to 1, without 1."""
        if self.sequences is None:
            keys = [(index if type(index) is int else _key(index)) % 2**64 for index in self.indices]
            self.sequences = _spread(np.array(keys, np.uint64) ^ np.uint64(self.stream))[:, None]
        steps = np.arange(self.drawn + 1, self.drawn + columns + 1, dtype=np.uint64)
        self.drawn += columns
        # The upper 53 bits, which are all that a float64 holds.
        numbers: np.ndarray = (_spread(self.sequences + STEP * steps) >> np.uint64(11)) * 2.0**-53
        return numbers


# Of the samples that are being read now.
_numbers: Numbers | None = None


def sample_uniform(count: int, columns: int) -> Tensor:
    """Random numbers for augmentation of a whole batch at once, as functions of (seed, epoch, index) of each sample.

    Called while a loader reads, in `__getitem__` or `__getitems__` of a dataset: a sample gets the same numbers
    whatever it is read together with, and others in the next call, the next epoch, or when it is drawn again.

    Args:
        count: Samples: one in `__getitem__`, in `__getitems__` as many as there are indices, in their order. Of any
            other number, and of a dataset that nobody trains on, the numbers come from torch's global generator.
        columns: Numbers for each.

    Returns:
        float64 of shape (count, columns), on the CPU, from 0 to 1, without 1.
    """
    if _numbers is None or count != len(_numbers.indices):
        return torch.rand(count, columns, dtype=torch.float64, device="cpu")
    return torch.from_numpy(_numbers.next(columns))


class SeededDataset(Dataset[Any]):
    """A map dataset in which the random numbers behind a sample are a function of (seed, epoch, index).

    Before each sample torch (on the CPU), `random` and NumPy's global generator are seeded, so that augmentation does
    not depend on the number of workers, on prefetching or on where a run was resumed. A dataset that brings
    `__getitems__` is read through it and seeded once, from the batch's first index: what these generators draw is a
    function of the batch then, as is what `collate_fn` draws, and what `sample_uniform` draws one of each sample. In
    the main process the global generators are put back after each batch.

    Args:
        wrapped: The dataset; its attributes can be read and set here too.
        seed: Seed of the run.
        workers: Whether other processes read too.
        collate: Makes a batch of the samples that `__getitems__` has read.
        convert: Makes what is given out of a single sample, in a loader without batches.

    Raises:
        RuntimeError: A sample cannot be read; the message has its index. A worker returns `Unreadable` instead.
    """

    wrapped: Any
    _stream: int
    _shared: Tensor | None
    _reading: Any

    def __init__(
        self,
        wrapped: Any,
        seed: int,
        workers: bool = False,
        collate: Callable[[Any], Any] | None = None,
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        # What tells seed and epoch, and the same again for workers, which may outlive an epoch, in shared memory.
        stream = mix(seed, 0, 2)
        shared: Any = torch.tensor([stream], device="cpu").share_memory_() if workers else None  # type: ignore[no-untyped-call]
        # A subset has `__getitems__`, whether its dataset has or not.
        source = innermost(wrapped)
        by_batch = callable(getattr(source, "__getitems__", None))
        fixed = type(source) in FIXED and collate in (None, default_collate) and convert is None
        rows = type(source) is TensorDataset and collate is default_collate
        rows = rows and all(type(part) is Tensor and part.layout is torch.strided for part in source.tensors)
        self.__dict__.update(wrapped=wrapped, _stream=stream, _shared=shared, _by_batch=by_batch, _fixed=fixed)
        self.__dict__.update(_collate=collate, _convert=convert, _reading=None, _rows=rows)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Choose the random numbers of the samples read from now on."""
        self.__dict__["_stream"] = mix(seed, epoch, 2)
        if self._shared is not None:
            self._shared[0] = self._stream

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: Any) -> Any:
        # What lies in memory is there without much ado.
        return self.wrapped[index] if self._fixed else self._read([index], single=True)

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
        self.__dict__["_reading"] = None
        try:
            if self._fixed:
                return self._take(indices)
            with nullcontext() if in_worker else OwnRandomness():
                stream = self._stream if self._shared is None else int(self._shared)
                samples = self._samples(stream, indices, by_batch=self._by_batch and not single)
                if single and self._convert is not None:
                    _seed_sample(mix(stream, 3), indices[0])
                    return self._convert(samples[0])
                if single or self._collate is None:
                    return samples[0] if single else samples
                self.__dict__["_reading"] = None
                # A dataset that makes its batches itself leaves nothing to collate.
                if self._collate is not default_collate and isinstance(samples, list):
                    _seed_sample(mix(stream, 3), next(iter(indices), 0))
                return self._collate(samples)
        except Exception as error:
            line = self._explain(error, indices)
            if in_worker:
                return Unreadable(line, traceback.format_exc())
            raise explained(RuntimeError(line)) from error

    def _take(self, indices: list[Any]) -> Any:
        """A batch of samples behind which nothing is drawn at random."""
        if self._rows:
            # What `default_collate` makes of the samples, in one go.
            places = torch.tensor([_inner_index(self.wrapped, index) for index in indices])
            return [part[places.to(part.device, non_blocking=True)] for part in innermost(self.wrapped).tensors]
        samples = [self.wrapped[index] for index in indices]
        return samples if self._collate is None else self._collate(samples)

    def _samples(self, stream: int, indices: list[Any], by_batch: bool) -> Any:
        own, samples = self.__dict__, []
        if by_batch:
            return _read_seeded(self.wrapped.__getitems__, indices, stream, indices)
        for index in indices:
            own["_reading"] = index
            samples.append(_read_seeded(self.wrapped.__getitem__, index, stream, [index]))
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


class PreparedLoader(DataLoader[Any]):
    """A loader of a `SeededDataset`, in an order that does not depend on its workers.

    torch's loader asks a sampler of the user's for its order once or twice, and has drawn from the loader's generator
    before or has not, as there are workers, and as they were there in the epoch before. This one asks once, when the
    first index is wanted, and with the generator as it was when the epoch began.
    """

    @property
    def _index_sampler(self) -> Any:
        order, drawn = super()._index_sampler, self.generator
        return order if drawn is None or isinstance(self.sampler, EpochSampler) else _Order(order, drawn)

    def __iter__(self) -> Any:
        """Batches; without workers sooner than from torch, which records every batch for its profiler."""
        dataset: Any = self.dataset
        if self.num_workers or self.pin_memory or not isinstance(dataset, SeededDataset):
            return super().__iter__()
        if self.batch_sampler is not None:
            # The dataset has made a batch of its samples.
            return map(dataset.__getitems__, self._index_sampler)
        samples = map(dataset.wrapped.__getitem__ if dataset._fixed else dataset.__getitem__, self._index_sampler)
        return map(_converted if self.collate_fn is default_convert else self.collate_fn, samples)


class _Order:
    """What a sampler, or a batch sampler, gives: drawn, as often as it is asked for, from where its generator began."""

    def __init__(self, sampler: Any, generator: torch.Generator) -> None:
        self.sampler, self.generator = sampler, generator

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.generator.manual_seed(self.generator.initial_seed())
        yield from self.sampler


def _converted(sample: Any) -> Any:
    """What torch makes of a sample in a loader without batches; of tensors, without much ado."""
    return [*sample] if type(sample) is tuple and {*map(type, sample)} == {Tensor} else default_convert(sample)  # type: ignore[no-untyped-call]


def innermost(dataset: Any) -> Any:
    """The dataset behind subsets."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _inner_index(dataset: Any, index: Any) -> Any:
    while type(dataset) is Subset:
        dataset, index = dataset.dataset, dataset.indices[index]
    return index


def _read_seeded(read: Callable[[Any], Any], what: Any, stream: int, indices: list[Any]) -> Any:
    """Read a sample or a batch, with random numbers that only depend on the stream and on its indices."""
    global _numbers
    outer, _numbers = _numbers, Numbers(stream, indices)
    try:
        _seed_sample(stream, next(iter(indices), 0))
        return read(what)
    finally:
        _numbers = outer


def _seed_sample(stream: int, index: Any) -> None:
    seed_cpu(mix(stream, _number(index), getattr(index, "place", 0)))


def _number(index: Any) -> int:
    # A sampler of the user's may give keys of any type.
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())


def _key(index: Any) -> int:
    return _number(index) + PLACE * getattr(index, "place", 0)


def _spread(numbers: Any) -> Any:
    """What `engine.seed.mix` does to a number, without its last shift, to many: 64 well-mixed bits of each."""
    for shift, factor in SHIFTS:
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> np.uint64(31))

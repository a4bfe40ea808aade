"""Samples: their order and the randomness behind each of them, as functions of (seed, epoch, index), not as state."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset, WeightedRandomSampler, get_worker_info

from engine import distributed
from engine.seed import isolated_rng, mix, seed_cpu


class Draw(int):
    """An index drawn by weight; its place in the epoch's order tells it from the same index drawn again."""

    place: int

    def __new__(cls, index: int, place: int = 0) -> Draw:
        """The number `index`; without a place when it is unpickled, until its state is."""
        draw = super().__new__(cls, index)
        draw.place = place
        return draw


class EpochSampler(Sampler[int]):
    """Indices of one process in one epoch, as a function of (seed, epoch).

    Process r of w takes samples r, r + w, r + 2w, ... of the epoch's order. When training, the last `size % w`
    samples of the order are left out, so that all processes run the same number of batches; with shuffling these
    are others in every epoch. When evaluating, every sample of the order is taken exactly once.

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
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.taken = size - size % self.world if even else size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order the next `iter` gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        mine = slice(self.rank, self.taken, self.world)
        places = range(self.size)[mine]
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        if self.weighted is not None:
            order = torch.multinomial(self.weighted.weights, self.size, self.weighted.replacement, generator=generator)
            return map(Draw, order[mine].tolist(), places)
        return iter(torch.randperm(self.size, generator=generator)[mine].tolist() if self.shuffle else places)

    def __len__(self) -> int:
        return len(range(self.rank, self.taken, self.world))


class SeededDataset(Dataset[Any]):
    """A map dataset in which the random numbers behind a sample are a function of (seed, epoch, index).

    Before each sample torch (on the CPU), `random` and NumPy's global generator are seeded, so that augmentation does
    not depend on the number of workers, on prefetching or on where a run was resumed. A dataset that brings
    `__getitems__` is read through it and seeded once, from the batch's first index: a function of the batch then.
    In the main process the global generators are put back after each batch. What `collate_fn` draws is not covered.

    Args:
        wrapped: The dataset; its attributes can be read and set here too.
        seed: Seed of the run.
        workers: Whether other processes read too.
    """

    wrapped: Any
    _now: list[int]
    _clock: Tensor

    def __init__(self, wrapped: Any, seed: int, workers: bool = False) -> None:
        # Seed and epoch, and the same again for workers, which may outlive an epoch and see it in shared memory.
        clock = torch.tensor([seed, 0], device="cpu")
        if workers:
            clock.share_memory_()  # type: ignore[no-untyped-call]
        self.__dict__.update(wrapped=wrapped, _now=[seed, 0], _clock=clock)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Choose the random numbers of the samples read from now on."""
        self._now[:] = seed, epoch
        self._clock.copy_(torch.tensor([seed, epoch]))

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: Any) -> Any:
        return self._read([index], lambda indices: self.wrapped[indices[0]])

    def __getitems__(self, indices: list[Any]) -> Any:
        # A subset has `__getitems__`, whether its dataset has or not.
        source = self.wrapped
        while type(source) is Subset:
            source = source.dataset
        return self._read(indices, self.wrapped.__getitems__ if hasattr(source, "__getitems__") else None)

    def __getattr__(self, name: str) -> Any:
        # While an instance is unpickled or copied there is no `wrapped` yet.
        if name == "wrapped" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)

    def _read(self, indices: Any, read_batch: Callable[[Any], Any] | None) -> Any:
        in_worker = get_worker_info() is not None
        with nullcontext() if in_worker else isolated_rng(gpu=False):
            stream = mix(*(self._clock.tolist() if in_worker else self._now), 2)
            if read_batch is not None:
                _seed_sample(stream, next(iter(indices), 0))
                return read_batch(indices)
            samples = []
            for index in indices:
                _seed_sample(stream, index)
                samples.append(self.wrapped[index])
            return samples


def _seed_sample(stream: int, index: Any) -> None:
    # A sampler of the user's may give keys of any type.
    number = index if isinstance(index, int) else zlib.crc32(repr(index).encode())
    seed_cpu(mix(stream, number, index.place if isinstance(index, Draw) else 0))

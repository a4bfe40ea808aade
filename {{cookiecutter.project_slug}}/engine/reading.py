"""Reading a loader batch by batch: from any position of an epoch, under random numbers that move nobody else's.

Three kinds of loaders go on within an epoch. Those with our sampler skip what was read without reading it. Those
that keep a state of their own (`state_dict` and `load_state_dict`, of a loader or an iterable dataset) are given it
back. All others are read again from the start of the epoch, and what was done before is thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from engine import distributed
from engine.exceptions import MisconfigurationException, explained
from engine.samples import EpochSampler, PreparedLoader, SeededDataset, Unreadable
from engine.seed import OwnRandomness, capture_rng, mix, restore_rng, seed_cpu

# A loader without length: an iterable dataset, or any iterable.
UNKNOWN = math.inf
END = object()
# Seconds of reading what was done before, after which a line says so.
PATIENCE = 5.0


class Reader:
    """Reads one loader, epoch after epoch.

    Args:
        loader: A prepared loader.
        count: Batches of an epoch; `UNKNOWN` for all of a loader without length.
        together: Where only its end tells how many batches a loader has, end the epoch for all processes when the first
            of them has no more (training).

    Attributes:
        samples_done: Samples of the epoch's order that all processes together have had once the newest batch is done;
            0 where the order is not ours.
    """

    def __init__(self, loader: Any, count: int | float, together: bool = False) -> None:
        self.loader, self.count, self.samples_done = loader, count, 0
        dataset = getattr(loader, "dataset", None)
        self._ours = isinstance(loader, PreparedLoader) and own_sampler(loader) is not None
        # The length of an iterable dataset is an estimate: only its end says which batch was the last.
        self._ahead = length(loader) == UNKNOWN or isinstance(dataset, IterableDataset)
        self._together = together and self._ahead
        keeps_state: Any = dataset if isinstance(dataset, IterableDataset) and not loader.num_workers else loader
        stateful = all(hasattr(keeps_state, name) for name in ("state_dict", "load_state_dict"))
        self._source = keeps_state if stateful else None
        self._random = OwnRandomness(keep=True)
        self._resumed: dict[str, Any] | None = None
        self._before_ahead: dict[str, Any] = {}
        self._finished = False
        self._iterator: Iterator[Any] | None = None

    def epoch(
        self, seed: int, epoch: int, done: int = 0, samples_done: int = 0, count: int | float | None = None
    ) -> Iterator[tuple[int, Any, bool]]:
        """Yield (number, batch, whether it is the last) for the batches of an epoch, without those that are done.

        Args:
            seed: Seed of the run.
            epoch: Number of the epoch, which decides about order and random numbers.
            done: Number of the first batch; so many are left out, where the order is not ours.
            samples_done: Samples to leave out of our order, of all processes together.
            count: Batches of this epoch, rather than of every one.

        Raises:
            RuntimeError: A sample cannot be read.
        """
        start_epoch(self.loader, seed, epoch, samples_done)
        self._finished = False
        count, size, end = self._extent(done, samples_done, self.count if count is None else count)
        read = self._start(mix(seed, epoch, 4, distributed.data_rank()), done)
        batch = self._agreed(next(read, END)) if done < count else END
        following = None
        while batch is not END:
            if type(batch) is Unreadable:
                raise explained(RuntimeError(batch.line)) from RuntimeError(batch.details)
            following = None
            if self._ahead and done + 1 < count:
                self._before_ahead = self._capture()
                following = self._agreed(next(read, END))
                if following is END and self._source is not None:
                    self._before_ahead = {**self._capture(), "ended": True}
            last = following is END or done + 1 == count
            samples_done = self.samples_done = min(samples_done + size, end)
            yield done, batch, last
            done += 1
            batch = END if last else following if self._ahead else next(read, END)
        if self._source is not None and count in (UNKNOWN, length(self.loader)):
            # Seen to its end, so that its state says so; where another process has ended the epoch, as far as it was.
            if following is not END:
                next(read, END)
            self._finished = True

    def next_number(self, samples_done: int, window: int) -> int:
        """Number of the batch that begins after so many samples, if all before it had been of the present size.

        Rounded up so that a window of accumulated gradients begins with it.
        """
        samples = self._batch_size() * window
        return -(-samples_done // samples) * window

    def state_dict(self, done: int) -> dict[str, Any] | None:
        """What there is to know, beside their number, to go on after `done` batches of an epoch."""
        if self._resumed is not None:
            # Nothing was read since.
            return self._resumed
        if self._source is None or not (done or self._finished):
            return None
        return self._before_ahead if done and self._ahead else self._capture()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from here in the next epoch that is read."""
        self._resumed = state

    def close(self) -> None:
        """End workers now: an error that is kept would keep them, too."""
        if isinstance(self.loader, DataLoader):
            self.loader._iterator = None
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            for worker in getattr(iterator, "_workers", []):
                # One that is busy in C code hears no other signal.
                worker.kill()

    def inexact(self) -> str | None:
        """Why resuming within an epoch may not be exact; None where it is."""
        parts = {name: getattr(self.loader, name, None) for name in ("dataset", "sampler", "batch_sampler")}
        if self._source is not None and self.count not in (UNKNOWN, length(self.loader)):
            name = type(self._source).__name__
            return f"{name} is cut short by limit_train_batches: it does not go on exactly after a resume"
        if self._source is not None:
            workers = self._source is self.loader and bool(vars(self.loader).get("num_workers"))
            reason = "the random numbers that its workers draw are not in its state"
            return f"{type(self.loader).__name__}: after a resume within an epoch, {reason}" if workers else None
        if any(hasattr(part, "set_epoch") for part in (self.loader, *parts.values())):
            return None
        streams = not isinstance(self.loader, DataLoader) or isinstance(self.loader.dataset, IterableDataset)
        own = [part for name, part in parts.items() if name != "dataset" and part is not None]
        foreign = [part for part in own if not type(part).__module__.startswith(("torch.", "engine."))]
        if not streams and not foreign:
            return None
        name = type(foreign[0] if foreign else parts["dataset"] or self.loader).__name__
        return (
            f"{name} is read again from the epoch's start after a resume within it, which is exact only if its order "
            "comes from torch's, Python's or NumPy's global random numbers or is always the same; give it "
            "set_epoch(epoch), or state_dict and load_state_dict"
        )

    def _batch_size(self) -> int:
        """Samples of a batch, of all processes together."""
        return (self.loader.batch_size or 1) * distributed.data_world_size()

    def _extent(self, done: int, samples_done: int, count: int | float) -> tuple[int | float, int, int]:
        """Number behind the epoch's last batch, samples of a batch, and samples at the end; of our order only."""
        sampler = own_sampler(self.loader)
        if not self._ours or sampler is None:
            return count, 0, 0
        mine, batch_size, full = len(sampler.mine(samples_done)), self.loader.batch_size or 1, length(self.loader)
        left = mine // batch_size if self.loader.drop_last else -(-mine // batch_size)
        if count < full:
            # Cut short by limit_train_batches: to so many batches of the present size, rounded up.
            left = min(left, max(0, int(count) - self.next_number(samples_done, 1)))
        return done + left, self._batch_size(), samples_done + mine * sampler.world

    def _agreed(self, batch: Any) -> Any:
        """The batch, or END if another process has none: steps wait for each other."""
        return batch if not self._together or distributed.everywhere(batch is not END) else END

    def _start(self, seed: int, done: int) -> Iterator[Any]:
        if self._ours:
            self._iterator = iter(self.loader)
            return self._iterator
        self._apart(lambda: seed_cpu(seed))
        resumed, self._resumed = self._resumed, None
        within = bool(done)
        if resumed is not None and self._source is not None:
            self._before_ahead, done = resumed, 0
            try:
                with OwnRandomness():
                    restore_rng(resumed["random"])
                self._source.load_state_dict(resumed["source"])
            except Exception as error:
                raise MisconfigurationException(
                    f"the train loader's state in the checkpoint does not fit {type(self._source).__name__} ({error!r})"
                ) from error
        ended = within and resumed is not None and resumed["ended"]
        iterator = self._iterator = iter(()) if ended else self._apart(lambda: iter(self.loader))
        if resumed is not None and within:
            # After `iter`, which draws the order as at the epoch's start; a new epoch has new random numbers.
            random = resumed["random"]
            self._apart(lambda: restore_rng(random))
        apart = self._read_apart(iterator)
        begin, told = time.monotonic(), False
        for number in range(done):
            if next(apart, END) is END:
                break
            if not told and (told := time.monotonic() - begin > PATIENCE):
                print(f"reading the first {done} batches of the epoch again, {number + 1} so far", flush=True)
        return apart

    def _read_apart(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while (batch := self._apart(lambda: next(iterator, END))) is not END:
            yield batch

    def _apart(self, work: Callable[[], Any]) -> Any:
        """Work under the random numbers of this loader alone."""
        with self._random:
            return work()

    def _capture(self) -> dict[str, Any]:
        if self._source is None:
            return {}
        return {
            "source": deepcopy(self._source.state_dict()),
            "random": self._apart(lambda: capture_rng(gpu=False)),
            "ended": self._finished,
        }


def start_epoch(loader: Any, seed: int, epoch: int, samples_done: int = 0) -> None:
    """Tell a loader, its dataset and its samplers which epoch comes next, ours also how many samples it is to skip."""
    if isinstance(loader, DataLoader):
        if isinstance(loader.generator, torch.Generator):
            loader.generator.manual_seed(mix(seed, epoch, 1, distributed.data_rank()))
        if isinstance(loader.dataset, SeededDataset):
            loader.dataset.start_epoch(seed, epoch)
    ours = own_sampler(loader)
    if ours is not None:
        # A run that goes on takes its seed from the checkpoint, perhaps after the loader was made.
        ours.seed = seed
        ours.set_epoch(epoch, skipped=samples_done)
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    for part in (sampler, *(getattr(loader, name, None) for name in ("batch_sampler", "dataset"))):
        if hasattr(part, "set_epoch") and part is not ours:
            part.set_epoch(epoch)  # type: ignore[union-attr]


def own_sampler(loader: Any) -> EpochSampler | None:
    """The engine's sampler of a loader, if it has it."""
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, EpochSampler) else None


def length(loader: Any) -> int | float:
    """Number of batches; `UNKNOWN` where the loader does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return UNKNOWN

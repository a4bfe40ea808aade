"""The order of samples, and that reading data leaves the global generators alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import engine
import numpy as np
import pytest
import torch
from engine.data import prepare_loader
from engine.reading import start_epoch
from engine.samples import EpochSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from toy import Net, Stream, dataset, fit, loader, same_bits, trainer


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """The environment that torchrun gives a process."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    with patch.dict(os.environ, variables):
        yield


def order(rank: int, world: int, epoch: int, **options: Any) -> list[int]:
    with process(rank, world):
        sampler = EpochSampler(**options)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(sampler) == len(indices)
    return indices


sizes = st.integers(0, 60)
worlds = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 2**31)


@settings(deadline=None)
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_processes_train_on_disjoint_shares_of_equal_size(
    size: int, world: int, seed: int, epoch: int, shuffle: bool
) -> None:
    shares = [order(r, world, epoch, size=size, shuffle=shuffle, seed=seed, even=True) for r in range(world)]
    taken = [index for share in shares for index in share]
    assert {len(share) for share in shares} == {size // world}
    assert len(set(taken)) == len(taken) and set(taken) <= set(range(size))


@settings(deadline=None)
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_processes_evaluate_every_sample_exactly_once(
    size: int, world: int, seed: int, epoch: int, shuffle: bool
) -> None:
    shares = [order(r, world, epoch, size=size, shuffle=shuffle, seed=seed, even=False) for r in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs, even=st.booleans())
def test_the_order_is_a_function_of_seed_and_epoch_alone(
    size: int, world: int, seed: int, epoch: int, even: bool
) -> None:
    options: dict[str, Any] = {"size": size, "shuffle": True, "seed": seed, "even": even}
    first = order(world - 1, world, epoch, **options)
    torch.rand(3)
    assert order(world - 1, world, epoch, **options) == first
    # All processes together read the order of a single one.
    shares = [order(r, world, epoch, **options) for r in range(world)]
    single = order(0, 1, epoch, **{**options, "even": False})
    together = [share[i] for i in range(max(map(len, shares), default=0)) for share in shares if i < len(share)]
    assert together == single[: len(together)]


@pytest.mark.parametrize("changed", [{"seed": 6}, {"epoch": 1}])
def test_other_seeds_and_epochs_give_other_orders(changed: dict[str, int]) -> None:
    given: dict[str, Any] = {"size": 100, "shuffle": True, "seed": 5, "even": False, "epoch": 0}
    assert order(0, 1, **given) != order(0, 1, **{**given, **changed})


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert order(0, 1, 3, size=5, shuffle=False, seed=1, even=True) == [0, 1, 2, 3, 4]


class Order(Net):
    """Notes the targets of every training batch, which tell the samples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read.append(batch[1].flatten().tolist())
        return super().training_step(batch, batch_idx)


def read(train: Any, epochs: int = 3, **options: Any) -> list[list[float]]:
    model = Order()
    fit(model, train, max_epochs=epochs, **options)
    return model.read


def test_shuffled_epochs_differ_and_each_reads_every_sample_once() -> None:
    batches = read(loader(shuffle=True), epochs=2)
    first, second = sum(batches[:4], []), sum(batches[4:], [])
    assert first != second
    assert sorted(first) == sorted(second) == sorted(dataset()[:][1].flatten().tolist())


def test_the_order_follows_the_seed_whatever_was_drawn_before() -> None:
    first = read(loader(shuffle=True))
    engine.seed_everything(1)
    torch.rand(99)
    assert read(loader(shuffle=True)) == first
    engine.seed_everything(2)
    assert read(loader(shuffle=True)) != first


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"prefetch_factor": 4}])
def test_workers_read_the_same_order_as_the_process_itself(options: dict[str, Any]) -> None:
    alone = read(loader(shuffle=True))
    engine.seed_everything(1)
    assert read(loader(shuffle=True, num_workers=2, **options)) == alone


def test_a_limit_reads_the_first_batches_of_each_epochs_order() -> None:
    whole = read(loader(shuffle=True))
    engine.seed_everything(1)
    assert read(loader(shuffle=True), limit_train_batches=2) == [b for i, b in enumerate(whole) if i % 4 < 2]


class Noisy(torch.utils.data.Dataset[Any]):
    """Draws from every generator for each sample, as an augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3), torch.tensor([random.random() + float(np.random.rand())])


def test_random_augmentation_in_workers_differs_by_epoch_and_repeats_by_seed() -> None:
    first = read(DataLoader(Noisy(), batch_size=2, num_workers=2))
    engine.seed_everything(1)
    torch.rand(7)
    assert read(DataLoader(Noisy(), batch_size=2, num_workers=2)) == first
    assert len({tuple(batch) for batch in first}) == 9


def states() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_data_moves_no_global_generator(shuffle: bool, workers: int) -> None:
    seen = []

    class Watch(engine.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append(states())

    train = loader(4, shuffle=shuffle, num_workers=workers)
    before = states()
    run = trainer(callbacks=Watch(), max_epochs=2, num_sanity_val_steps=2)
    run.fit(model := Net(), train, loader(4, num_workers=workers))
    assert model.count("train") == 4
    assert all(same_bits(state, states()) for state in seen)
    engine.seed_everything(1)
    Net()
    assert not same_bits(before, [])


class Reversed(Sampler[int]):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(7, -1, -1))

    def __len__(self) -> int:
        return 8


def targets(indices: list[list[int]]) -> list[list[float]]:
    return [dataset()[rows][1].flatten().tolist() for rows in indices]


def test_a_custom_sampler_is_left_alone_and_told_the_epoch() -> None:
    sampler = Reversed()
    batches = read(loader(sampler=sampler), epochs=2)
    assert batches == targets([[7, 6], [5, 4], [3, 2], [1, 0]]) * 2
    assert sampler.epochs == [0, 1]


def test_a_custom_batch_sampler_is_left_alone() -> None:
    class Own(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 7], [1, 2, 3]])

        def __len__(self) -> int:
            return 2

    given = DataLoader(dataset(), batch_sampler=Own(range(8), 2, False))
    assert read(given, epochs=1) == targets([[0, 7], [1, 2, 3]])


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(dataset(), replacement=True, num_samples=4),
        RandomSampler(dataset(), num_samples=4),
    ],
    ids=["replacement", "fewer"],
)
def test_random_samplers_with_a_rule_of_their_own_keep_it(sampler: Any) -> None:
    assert [len(batch) for batch in read(loader(sampler=sampler), epochs=1)] == [2, 2]


WEIGHTS = [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]


@settings(deadline=None)
@given(number=st.integers(1, 40), world=worlds, seed=seeds, epoch=epochs, even=st.booleans(), replaced=st.booleans())
def test_weighted_draws_are_shared_like_any_order(
    number: int, world: int, seed: int, epoch: int, even: bool, replaced: bool
) -> None:
    given = WeightedRandomSampler(WEIGHTS, number if replaced else min(number, 4), replacement=replaced)
    options: dict[str, Any] = {"size": len(given), "shuffle": False, "seed": seed, "weighted": given}
    single = order(0, 1, epoch, **options, even=False)
    torch.rand(3)
    shares = [order(rank, world, epoch, **options, even=even) for rank in range(world)]
    taken = len(given) - len(given) % world if even else len(given)
    assert shares == [single[rank:taken:world] for rank in range(world)]
    assert set(single) <= {0, 1, 2, 3}
    assert replaced or len(set(single)) == len(single)


def test_weighted_draws_come_as_often_as_their_weights_say() -> None:
    given = WeightedRandomSampler(WEIGHTS, 20_000)
    drawn = order(0, 1, 0, size=20_000, shuffle=False, seed=1, even=True, weighted=given)
    counts = [drawn.count(index) / 20_000 for index in range(6)]
    assert counts == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.0, 0.0], abs=0.02)


def test_a_loader_with_weights_keeps_number_and_replacement_and_follows_seed_and_epoch() -> None:
    def drawn() -> list[list[float]]:
        return read(loader(sampler=WeightedRandomSampler(range(8), 6)), epochs=2)

    first = drawn()
    assert [len(batch) for batch in first] == [2] * 6
    assert first[:3] != first[3:]
    assert targets([[0]])[0][0] not in sum(first, [])
    torch.rand(9)
    engine.seed_everything(1)
    assert drawn() == first
    engine.seed_everything(2)
    assert drawn() != first
    once = read(loader(sampler=WeightedRandomSampler([1.0] * 8, 8, replacement=False)), epochs=1)
    assert sorted(sum(once, [])) == sorted(dataset()[:][1].flatten().tolist())


def test_two_processes_share_a_loader_with_weights() -> None:
    shares = []
    for rank in range(2):
        given = loader(sampler=WeightedRandomSampler(range(8), 7))
        with process(rank, 2):
            ready = prepare_loader(given, seed=3, training=True)
        start_epoch(ready, 3, 1)
        shares.append(list(ready.sampler))
    single = order(0, 1, 1, size=7, shuffle=False, seed=3, even=False, weighted=WeightedRandomSampler(range(8), 7))
    assert shares == [single[0:6:2], single[1:6:2]]


@pytest.mark.parametrize(("sampler", "share"), [(Reversed(), True), (WeightedRandomSampler(range(8), 7), False)])
def test_a_loader_that_shares_nothing_keeps_its_sampler_and_says_so(sampler: Any, share: bool) -> None:
    with process(0, 2), pytest.warns(UserWarning, match="gives every process all its samples"):
        ready = prepare_loader(loader(sampler=sampler), seed=3, training=True, share=share)
    assert ready.sampler is sampler


def test_a_subclass_of_the_loader_is_left_alone() -> None:
    class Twice(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([batch for batch in super().__iter__() for _ in range(2)])

        def __len__(self) -> int:
            return 2 * super().__len__()

    assert read(Twice(dataset(), batch_size=4), epochs=1) == targets([[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2)


def test_the_dataset_is_told_the_epoch() -> None:
    class Told(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = Told()
    read(DataLoader(data, batch_size=2), epochs=3)
    assert data.epochs == [0, 1, 2]


def collate(rows: list[Any]) -> Any:
    xs, ys = zip(*rows, strict=True)
    return torch.stack(xs), torch.stack(ys).abs()


def test_a_rebuilt_loader_keeps_its_other_arguments() -> None:
    given = loader(7, batch_size=3, shuffle=True, drop_last=True, collate_fn=collate)
    batches = read(given, epochs=1)
    assert [len(batch) for batch in batches] == [3, 3]
    assert all(value >= 0 for batch in batches for value in batch)


def test_evaluation_keeps_the_order_of_an_unshuffled_set() -> None:
    outputs = trainer().predict(model := Net(), loader(7))
    # In the same batches: how many samples are multiplied at once may decide about the last bit.
    assert outputs is not None and [len(output) for output in outputs] == [2, 2, 2, 1]
    assert all(output.equal(model(x)) for output, x in zip(outputs, dataset(7)[:][0].split(2), strict=True))


@pytest.mark.parametrize(("seed", "ok"), [(0, True), (2**32 - 1, True), (-1, False), (2**32, False)])
def test_seeds_in_range_reach_every_generator(seed: int, ok: bool) -> None:
    if not ok:
        with pytest.raises(engine.MisconfigurationException, match=f"seed={seed} is out of range"):
            engine.seed_everything(seed)
        return
    draws = []
    for _ in range(2):
        assert engine.seed_everything(seed) == seed
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_without_batches_has_our_order_too_and_skips_what_was_read(shuffle: bool) -> None:
    """Its samples are what is run in a step: batches that lie in memory, say."""
    batches = [torch.full((2,), float(number)) for number in range(8)]
    ready = prepare_loader(DataLoader(batches, batch_size=None, shuffle=shuffle), seed=5, training=True)

    def read(epoch: int, done: int = 0) -> list[float]:
        start_epoch(ready, 5, epoch, done)
        return [batch[0].item() for batch in ready]

    state = torch.get_rng_state()
    first, second = read(0), read(1)
    assert sorted(first) == sorted(second) == [float(number) for number in range(8)]
    assert (first != second) is shuffle and read(0) == first and read(0, done=3) == first[3:]
    assert torch.get_rng_state().equal(state)


def test_a_tensor_dataset_is_read_at_once_and_gives_what_torch_gives() -> None:
    data = TensorDataset(torch.arange(12).reshape(6, 2), torch.arange(6.0))
    for chosen in (data, Subset(data, [5, 3, 1, 0])):
        plain = DataLoader(chosen, batch_size=4)
        ready = prepare_loader(DataLoader(chosen, batch_size=4), seed=5, training=False)
        assert same_bits(list(ready), list(plain))

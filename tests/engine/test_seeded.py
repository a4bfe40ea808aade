"""Random numbers behind samples: a function of seed, epoch and index, whoever reads them and when."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import engine
import numpy as np
import pytest
import torch
from engine import data, reading
from engine.data import prepare_loader
from engine.reading import Reader, start_epoch
from engine.samples import PreparedLoader, SeededDataset
from engine.seed import capture_rng, restore_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset, WeightedRandomSampler
from toy import Net, fit, loader, same_bits, weights

SIZE = 10


class Augmented(Dataset[Any]):
    """Each sample is its index and a draw of every generator."""

    note = "of the dataset"

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: Any) -> Any:
        draws = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([float(index), *draws], dtype=torch.float64)


class Bulk(Augmented):
    """Reads whole batches."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Keyed(Augmented):
    """Has keys in place of indices."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(len(str(index)))


def prepared(given: DataLoader[Any], seed: int = 5) -> DataLoader[Any]:
    ready: DataLoader[Any] = prepare_loader(given, seed=seed, training=True)
    return ready


def read(ready: DataLoader[Any], epoch: int = 0, seed: int = 5) -> torch.Tensor:
    """All samples of an epoch, in the order of their indices."""
    start_epoch(ready, seed, epoch)
    samples = torch.cat(list(ready))
    return samples[samples[:, 0].argsort()]


def two_epochs(data: Any = None, seed: int = 5, **options: Any) -> torch.Tensor:
    ready = prepared(DataLoader(data or Augmented(), **{"batch_size": 4, "shuffle": True, **options}), seed)
    return torch.stack([read(ready, epoch, seed) for epoch in range(2)])


ALONE = two_epochs()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3, "shuffle": False},
        {"num_workers": 1},
        {"num_workers": 2, "prefetch_factor": 4},
        {"num_workers": 2, "persistent_workers": True},
        pytest.param(
            {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}, marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_samples_are_the_same_whatever_reads_them(options: dict[str, Any]) -> None:
    assert two_epochs(**options).equal(ALONE)


def test_samples_draw_different_numbers_and_others_in_another_epoch_and_run() -> None:
    draws = torch.cat([ALONE.flatten(0, 1), two_epochs(seed=6).flatten(0, 1)])[:, 1:]
    assert draws.flatten().unique().numel() == 2 * 2 * SIZE * 3
    # The generators do not repeat each other either.
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.6


def test_a_later_epoch_does_not_depend_on_earlier_ones() -> None:
    assert read(prepared(DataLoader(Augmented())), epoch=1).equal(ALONE[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Augmented(), Bulk()])
def test_reading_leaves_the_global_generators_alone(data: Any, workers: int) -> None:
    random.gauss(0, 1), np.random.randn()  # Of pairs that are drawn the second is kept for later.
    before = [torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()]
    expected = np.random.RandomState()
    expected.set_state(np.random.get_state())
    ready = prepared(DataLoader(data, batch_size=4, num_workers=workers))
    read(ready)
    assert ready.dataset[3].equal(ready.dataset[3])
    after = [torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()]
    assert same_bits(before, after)
    assert expected.randn() == np.random.randn()


def test_a_single_sample_is_that_of_the_epoch() -> None:
    ready = prepared(DataLoader(Augmented()))
    start_epoch(ready, 5, 1)
    assert ready.dataset[7].equal(ALONE[1, 7])


def test_a_dataset_that_reads_batches_is_seeded_by_the_first_index() -> None:
    bulk = two_epochs(Bulk(), shuffle=False)
    assert bulk[:, ::4].equal(ALONE[:, ::4])
    assert not bulk[:, 1].equal(ALONE[:, 1])
    assert two_epochs(Bulk(), shuffle=False, num_workers=2).equal(bulk)


def test_a_subset_is_seeded_as_its_dataset_would_be() -> None:
    assert two_epochs(Subset(Subset(Augmented(), range(SIZE)), range(SIZE))).equal(ALONE)
    bulk = two_epochs(Subset(Bulk(), range(SIZE)), shuffle=False)
    assert bulk.equal(two_epochs(Bulk(), shuffle=False)) and not bulk.equal(ALONE)


class Keys(Sampler[Any]):
    def __init__(self, keys: list[Any]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_of_any_type_have_numbers_of_their_own(workers: int) -> None:
    keys = Keys(["a", ("b", 1), np.int64(3), torch.tensor(4), None, -5])
    ready = prepared(DataLoader(Keyed(), batch_size=2, sampler=keys, num_workers=workers))
    samples = read(ready)
    assert samples[:, 1:].unique().numel() == 6 * 3
    assert samples.equal(read(prepared(DataLoader(Keyed(), batch_size=3, sampler=keys))))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": range(SIZE), "batch_size": 3},
        {"batch_sampler": [[3, 1], [0, 2, 4], [5, 6, 7, 8, 9]]},
        {"batch_sampler": BatchSampler(range(SIZE), 4, False)},
        {"sampler": BatchSampler(range(SIZE), 1, False), "batch_size": None},
    ],
    ids=["sampler", "batches", "batch sampler", "no batches"],
)
def test_loaders_with_an_order_of_their_own_keep_it_and_are_seeded(options: dict[str, Any]) -> None:
    class Listed(Augmented):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index[0])[None] if isinstance(index, list) else super().__getitem__(index)

    given = DataLoader(Listed(), **options)
    ready = prepared(given)
    assert [list(b[:, 0]) for b in ready] == [list(b[:, 0]) for b in given]
    samples = read(ready)
    assert samples.equal(read(prepared(DataLoader(Listed(), num_workers=2, **options))))
    assert not samples.equal(read(ready, epoch=1))
    if options.get("batch_size", 1) is not None:
        assert samples.equal(ALONE[0])


class Drawn(Sampler[Any]):
    """An order that is drawn when it is asked for, or when the first index is; in batches if they have a size."""

    def __init__(self, generator: torch.Generator | None, eager: bool, batch_size: int | None = None) -> None:
        self.generator, self.eager, self.batch_size = generator, eager, batch_size

    def __len__(self) -> int:
        return SIZE // (self.batch_size or 1)

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._drawn()]) if self.eager else self._drawn()

    def _drawn(self) -> Iterator[Any]:
        order = torch.randperm(SIZE, generator=self.generator)
        yield from order.tolist() if self.batch_size is None else order.view(-1, self.batch_size).tolist()


class WithTorchs(PreparedLoader):
    """Read by torch's iterator, also without workers."""

    __iter__ = DataLoader.__iter__


def batches_of(drawn: Drawn, workers: int = 0, alive: bool = False, epochs: tuple[int, ...] = (3,)) -> list[Tensor]:
    """The batches of the last of some epochs."""
    options: dict[str, Any] = {"batch_sampler": drawn} if drawn.batch_size else {"sampler": drawn, "batch_size": None}
    options |= {"num_workers": workers, "persistent_workers": alive, "generator": drawn.generator}
    reader = Reader(prepared(DataLoader(Augmented(), **options)), reading.UNKNOWN)
    try:
        return [[batch for _, batch, _ in reader.epoch(7, epoch)] for epoch in epochs][-1]
    finally:
        reader.close()


@pytest.mark.parametrize("eager", [True, False], ids=["at once", "later"])
@pytest.mark.parametrize("shared", [True, False], ids=["the loader's generator", "torch's"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_an_order_of_their_own_is_the_same_whoever_reads_it_and_what_was_read_before(
    batch_size: int | None, shared: bool, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> Drawn:
        return Drawn(torch.Generator() if shared else None, eager, batch_size)

    here = batches_of(drawn())
    assert sorted(sample[0] for batch in here for sample in batch.view(-1, 4)) == [*range(SIZE)]
    others = [
        batches_of(drawn(), epochs=(2, 3)),
        batches_of(drawn(), workers=1),
        batches_of(drawn(), workers=1, alive=True, epochs=(2, 3)),
    ]
    monkeypatch.setattr(data, "PreparedLoader", WithTorchs)
    for other in (*others, batches_of(drawn())):
        assert len(other) == len(here) and all(map(torch.equal, other, here))


class Doubled(DataLoader[Any]):
    """Gives every batch twice."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() for _ in range(2))


class Handed:
    """Not a DataLoader, though it has a dataset."""

    def __init__(self, given: Any) -> None:
        self.given, self.dataset = given, given.dataset

    def __iter__(self) -> Any:
        return iter(self.given)


@pytest.mark.parametrize(("kind", "count"), [(Doubled, 4), (lambda *given: Handed(DataLoader(*given)), 2)])
def test_loaders_of_other_kinds_are_read_by_themselves_whatever_their_dataset(kind: Any, count: int) -> None:
    ready = prepared(kind(SeededDataset(Augmented(), 7), 5))
    assert len([*Reader(ready, reading.UNKNOWN).epoch(7, 0)]) == count


def test_a_loader_of_the_same_kind_can_be_made_of_its_parts_or_of_others() -> None:
    ready = prepared(DataLoader(Augmented(), 5, sampler=Drawn(None, eager=False)))
    for dataset in (ready.dataset, ready.dataset.wrapped):  # type: ignore[attr-defined]
        assert [len(batch) for batch in type(ready)(dataset, 4)] == [4, 4, 2]


class Told(Sampler[int]):
    """Notes the epochs that it is told of."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


class Reversed(BatchSampler):
    """Batches from the last to the first."""

    def __iter__(self) -> Iterator[list[int]]:
        return reversed([*super().__iter__()])


@pytest.mark.parametrize("kind", [BatchSampler, Reversed, None])
def test_a_sampler_is_told_the_epoch_once_whatever_makes_batches_of_it(kind: type[BatchSampler] | None) -> None:
    told = Told()
    options: dict[str, Any] = {"sampler": told, "batch_size": 4}
    ready = prepared(DataLoader(Augmented(), **(options if kind is None else {"batch_sampler": kind(told, 4, False)})))
    told.epochs.clear()
    for epoch in (0, 1):
        start_epoch(ready, 7, epoch)
    assert told.epochs == [0, 1]


def test_a_batch_sampler_of_torchs_keeps_its_size_and_its_short_batch() -> None:
    ready = prepared(DataLoader(Augmented(), batch_sampler=BatchSampler(range(SIZE), 4, True)))
    assert [len(batch) for batch in ready] == [4, 4] and len(ready) == 2


def test_repeated_draws_of_a_sample_are_augmented_differently() -> None:
    sampler = WeightedRandomSampler([0.0] * 9 + [1.0], 6)
    samples = read(prepared(DataLoader(Augmented(), batch_size=4, sampler=sampler)))
    assert samples[:, 0].tolist() == [9.0] * 6
    assert samples[:, 1:].unique().numel() == 6 * 3
    workers = DataLoader(Augmented(), batch_size=2, sampler=sampler, num_workers=2)
    assert torch.equal(read(prepared(workers)), samples)


def test_attributes_are_the_datasets_to_read_and_to_set() -> None:
    data = Augmented()
    wrapper: Any = SeededDataset(data, 1)
    assert wrapper.note == "of the dataset" and len(wrapper) == SIZE
    wrapper.note = "changed"
    assert data.note == "changed"
    with pytest.raises(AttributeError, match="'Augmented' object has no attribute 'missing'"):
        _ = wrapper.missing
    assert SeededDataset(Subset(data, [1]), 1).dataset is data


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copy_reads_the_same(clone: Any) -> None:
    wrapper = SeededDataset(Augmented(), 5)
    wrapper.start_epoch(5, 1)
    assert clone(wrapper)[2].equal(wrapper[2])
    assert wrapper[2].equal(ALONE[1, 2])


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        x = torch.rand(3) + random.random() + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), self.net)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_training_with_augmentation_and_dropout_ends_in_the_same_bits_with_and_without_workers(
    options: dict[str, Any],
) -> None:
    ends = []
    for given in ({}, options):
        engine.seed_everything(1)
        model = Dropping()
        fit(model, DataLoader(Noise(), batch_size=2, shuffle=True, **given), loader(), max_epochs=3)
        ends.append(weights(model))
    assert ends[0].equal(ends[1])


def noisy(sample: torch.Tensor) -> torch.Tensor:
    """A `collate_fn` for single samples that draws."""
    return torch.cat([sample, torch.rand(1, dtype=torch.float64)])[None]


def test_what_converts_single_samples_draws_for_the_sample_alone() -> None:
    single = {"batch_size": None, "collate_fn": noisy}
    before = torch.get_rng_state()
    alone = two_epochs(**single)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(two_epochs(**single, num_workers=2), alone)
    assert alone[0, :, -1].unique().numel() == SIZE and not torch.equal(alone[0], alone[1])


def older(state: dict[str, Any]) -> dict[str, Any]:
    """The same state as checkpoints held it before: without tensors for Python and NumPy."""
    (version, words, reserve), (name, keys, *rest) = state["python"], state["numpy"]
    return {**state, "python": (version, tuple(words.tolist()), reserve), "numpy": (name, keys.tolist(), *rest)}


@pytest.mark.parametrize("form", [dict, older])
def test_generators_go_on_from_a_state_that_was_saved(form: Any, tmp_path: Any) -> None:
    def draws() -> list[float]:
        normal = [random.gauss(0, 1), np.random.normal(), np.random.normal(), float(torch.randn(()))]
        return [*normal, random.random(), float(np.random.rand())]

    # Of the normal numbers, which come in pairs, the second is in reserve.
    random.gauss(0, 1), np.random.normal()
    torch.save(form(capture_rng()), tmp_path / "state.pt")
    expected = draws()
    restore_rng(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected

"""Augmentation of whole batches: every image by its own numbers, the same whatever it is read together with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import DInterface
from data.standard_data import StandardData
from engine import MisconfigurationException, sample_uniform
from engine.data import prepare_loader
from engine.reading import start_epoch
from engine.samples import Draw, SeededDataset
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset, TensorDataset, WeightedRandomSampler
from torchvision.transforms.v2 import functional
from utils import augmentation, samples
from utils.augmentation import (
    random_affine,
    random_brightness,
    random_contrast,
    random_crop,
    random_erasing,
    random_flip,
    scaled,
    take,
)
from utils.registry import build_dataset
from utils.samples import as_batch

COUNT = 40
PIXELS = torch.randint(256, (COUNT, 3, 12, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
DTYPES = [torch.uint8, torch.float32, torch.bfloat16]  # NumPy has no bfloat16: that is the way of other devices


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The random numbers that the next function draws."""
    drawn = np.random.default_rng(1).random((COUNT, 8))
    monkeypatch.setattr(augmentation, "uniform", lambda images, columns: drawn[: len(images), :columns])
    return drawn


def of_type(dtype: torch.dtype) -> Tensor:
    return PIXELS.to(dtype) if dtype is not torch.uint8 else PIXELS.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "size"), [(3, None), (0, (7, 4)), (1, (9, 12)), (0, None)])
def test_a_crop_is_torchvisions(numbers: np.ndarray, dtype: torch.dtype, padding: int, size: Any) -> None:
    images = of_type(dtype)
    before = images.clone()
    given = random_crop(images, padding, size)
    height, width = size or (12, 10)
    for number, (image, crop) in enumerate(zip(images, given, strict=True)):
        top = math.floor(numbers[number, 0] * (12 + 2 * padding - height + 1))
        left = math.floor(numbers[number, 1] * (10 + 2 * padding - width + 1))
        expected = functional.crop(functional.pad(image, [padding] * 4), top, left, height, width)
        assert torch.equal(crop, expected)
    assert given.dtype is dtype and torch.equal(images, before)


def test_crops_are_at_every_place_and_no_larger_than_the_image() -> None:
    image = torch.arange(36.0).reshape(1, 1, 6, 6).expand(500, -1, -1, -1)
    corners = random_crop(image, size=(4, 4))[:, 0, 0, 0]
    assert sorted(corners.unique().tolist()) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    with pytest.raises(ValueError, match=r"size=\(7, 6\) of images of 6 x 6; give a smaller one, or padding"):
        random_crop(image, size=(7, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flip_is_torchvisions(numbers: np.ndarray, dtype: torch.dtype) -> None:
    images = of_type(dtype)
    before = images.clone()
    for number, (image, given) in enumerate(zip(images, random_flip(images, 0.3), strict=True)):
        assert torch.equal(given, functional.horizontal_flip(image) if numbers[number, 0] < 0.3 else image)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_erasing_is_torchvisions(numbers: np.ndarray, dtype: torch.dtype) -> None:
    images = of_type(dtype)
    before, erased = images.clone(), 0
    given = random_erasing(images, 0.7, area=(0.05, 0.6), ratio=(0.4, 2.5))
    for number, (image, changed) in enumerate(zip(images, given, strict=True)):
        chosen, share, form, down, right = numbers[number, :5]
        pixels, ratio = (0.05 + 0.55 * share) * 120, 0.4 * (2.5 / 0.4) ** form
        high, wide = min(round(math.sqrt(pixels * ratio)), 12), min(round(math.sqrt(pixels / ratio)), 10)
        top, left = math.floor(down * (12 - high + 1)), math.floor(right * (10 - wide + 1))
        expected = functional.erase(image, top, left, high, wide, torch.zeros(3, 1, 1)) if chosen < 0.7 else image
        assert torch.equal(changed, expected)
        erased += not torch.equal(changed, image)
    assert 0 < erased < COUNT and torch.equal(images, before)


def test_an_affine_map_is_torchvisions(numbers: np.ndarray) -> None:
    images = scaled(PIXELS)
    given = random_affine(images, degrees=30, translate=(0.2, 0.1), scale=(0.7, 1.4))
    for number, (image, changed) in enumerate(zip(images, given, strict=True)):
        turn, across, down, factor = numbers[number, :4]
        moves = [(2 * across - 1) * 0.2 * 10, (2 * down - 1) * 0.1 * 12]
        options: dict[str, Any] = {"shear": [0.0, 0.0], "interpolation": functional.InterpolationMode.BILINEAR}
        expected = functional.affine(image, (2 * turn - 1) * 30, moves, 0.7 + 0.7 * factor, **options)
        torch.testing.assert_close(changed, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(random_affine(images), images)


@pytest.mark.parametrize("channels", [3, 1])
def test_brightness_and_contrast_are_torchvisions(numbers: np.ndarray, channels: int) -> None:
    images = scaled(PIXELS)[:, :channels]
    bright, contrast = random_brightness(images, 0.6), random_contrast(images, 0.6)
    for number, image in enumerate(images):
        factor = 0.4 + 1.2 * numbers[number, 0]
        torch.testing.assert_close(bright[number], functional.adjust_brightness(image, factor))
        torch.testing.assert_close(contrast[number], functional.adjust_contrast(image, factor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [random_affine, random_brightness, random_contrast])
def test_what_computes_needs_floats(change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{change.__name__} takes images of floats, not torch.uint8; do it after"):
        change(PIXELS)


def test_pixels_and_rows_are_the_same_as_torchs() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert scaled(pixels).dtype is torch.float32 and scaled(pixels)[[0, 255]].tolist() == [0.0, 1.0]
    torch.testing.assert_close(scaled(pixels), functional.to_dtype(pixels, torch.float32, scale=True))
    indices = [3, 0, 3, -1]
    for values in (PIXELS, PIXELS.to(torch.bfloat16), PIXELS.numpy(), PIXELS.tolist()):
        assert torch.equal(take(values, indices), torch.as_tensor(values)[indices])
    copied = take(PIXELS, [0])
    copied.zero_()
    assert PIXELS[0].any()


class Drawing(Dataset[Any]):
    """A sample is its index and numbers of two draws, by batch or not."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        drawn = [sample_uniform(len(indices), columns) for columns in (2, 1)]
        return torch.cat([torch.tensor(indices, dtype=torch.float64)[:, None], *drawn], 1)


class OneByOne(Drawing):
    """The same, read sample by sample."""

    __getitems__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Tensor:
        return Drawing.__getitems__(self, [index])[0]


def read(dataset: Any, epoch: int = 0, seed: int = 5, **options: Any) -> Tensor:
    """All samples of an epoch, in the order of their indices."""
    options = {"batch_size": 5, "shuffle": "sampler" not in options, "collate_fn": as_batch, **options}
    ready = prepare_loader(DataLoader(dataset, **options), seed=seed, training=True)
    start_epoch(ready, seed, epoch)
    found = torch.cat(list(ready))
    return found[found[:, 0].argsort(stable=True)]


ALONE = read(Drawing())


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 12},
        {"batch_size": 7, "shuffle": False},
        {"num_workers": 1},
        {"num_workers": 2, "batch_size": 3},
        pytest.param({"num_workers": 2, "multiprocessing_context": "spawn"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_numbers_are_those_of_the_sample_whatever_it_is_read_with(options: dict[str, Any]) -> None:
    assert read(Drawing(), **options).equal(ALONE)


@pytest.mark.parametrize(
    "make",
    [
        OneByOne,
        lambda: Subset(Drawing(), range(12)),
        lambda: Subset(Subset(Drawing(), range(12)), range(12)),
        lambda: ConcatDataset([Drawing()]),
    ],
    ids=["one by one", "subset", "subset of subset", "concat"],
)
def test_subsets_and_single_reads_get_the_same_numbers(make: Callable[[], Any]) -> None:
    assert read(make()).equal(ALONE)


def test_a_single_sample_is_that_of_the_epoch() -> None:
    seeded = SeededDataset(Drawing(), 5, collate=as_batch)
    for epoch in range(2):
        seeded.start_epoch(5, epoch)
        whole = seeded.__getitems__([4, 7, 1])
        assert seeded[7].equal(whole[1]) and seeded.__getitems__([7])[0].equal(whole[1])


def test_samples_calls_epochs_and_seeds_differ() -> None:
    drawn = torch.cat([read(Drawing(), epoch, seed)[:, 1:] for epoch, seed in ((0, 5), (1, 5), (0, 6))])
    assert drawn.unique().numel() == drawn.numel() == 3 * 12 * 3
    assert 0 <= drawn.min() and drawn.max() < 1


def test_numbers_are_spread_evenly() -> None:
    class Many(Drawing):
        def __len__(self) -> int:
            return 20000

    drawn = read(Many(), batch_size=500)[:, 1:].numpy()
    assert drawn.shape == (20000, 3)
    for column in drawn.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared with 19 degrees of freedom: 1 of 1000 is above 44
    assert np.abs(np.corrcoef(np.concatenate([drawn, np.roll(drawn, 1, 0)], 1).T) - np.eye(6)).max() < 0.03


def test_draws_of_one_sample_differ_and_do_not_depend_on_the_batch() -> None:
    weights = [1.0] + [0.0] * 11
    found = [
        read(Drawing(), sampler=WeightedRandomSampler(weights, 8), batch_size=size, num_workers=workers)
        for size, workers in ((8, 0), (3, 0), (2, 2))
    ]
    assert found[0][:, 0].tolist() == [0.0] * 8 and found[0][:, 1:].unique().numel() == 8 * 3
    assert found[1].equal(found[0]) and found[2].equal(found[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_two_processes_share_the_samples_of_one(weighted: bool) -> None:
    order = {"sampler": WeightedRandomSampler([1.0, 2.0] * 6, 12)} if weighted else {}
    found = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        options: dict[str, Any] = {"batch_size": 4, "shuffle": not weighted, "collate_fn": as_batch, **order}
        ready: Any = prepare_loader(DataLoader(Drawing(), **options), seed=5, training=True)
        ready.sampler.rank, ready.sampler.world = rank, world
        start_epoch(ready, 5, 1)
        found.append({tuple(sample) for sample in torch.cat(list(ready)).tolist()})
    assert len(found[0]) == 12 and len(found[1]) == len(found[2]) == 6
    assert found[1] | found[2] == found[0]


class Keys(Sampler[Any]):
    def __iter__(self) -> Any:
        return iter([-5, 3, np.int64(3), "a", None, 2**70, Draw(3, 1)])

    def __len__(self) -> int:
        return 7


@pytest.mark.parametrize("size", [7, 2])
def test_keys_of_any_type_have_numbers_of_their_own(size: int) -> None:
    class Keyed(Drawing):
        def __getitems__(self, indices: list[Any]) -> Tensor:
            return super().__getitems__(list(range(len(indices))))

    found = read(Keyed(), sampler=Keys(), batch_size=size)[:, 1:]
    assert found.unique().numel() == 7 * 3
    assert sorted(found[:, 0].tolist()) == sorted(read(Keyed(), sampler=Keys(), batch_size=1)[:, 1].tolist())


def test_elsewhere_numbers_come_from_torch() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4, 2, dtype=torch.float64)
    torch.manual_seed(3)
    assert sample_uniform(4, 2).equal(expected)

    class Doubled(Drawing):
        """Asks for more than one for each sample: a function of the batch then."""

        def __getitems__(self, indices: list[int]) -> Tensor:
            return torch.cat([torch.tensor(indices)[:, None], sample_uniform(2 * len(indices), 1)[::2]], 1)

    assert read(Doubled(), shuffle=False).equal(read(Doubled(), shuffle=False, num_workers=2))


def test_reading_within_reading_leaves_the_outer_numbers_alone() -> None:
    inner = SeededDataset(Drawing(), 1, collate=as_batch)

    class Outer(Drawing):
        def __getitems__(self, indices: list[int]) -> Tensor:
            inner.__getitems__([0, 1])
            return super().__getitems__(indices)

    assert read(Outer()).equal(ALONE)


def test_a_tensor_dataset_is_read_by_batch_and_gives_what_torch_gives() -> None:
    class Counted(Tensor):
        pass

    data = TensorDataset(torch.randn(12, 3), torch.arange(12))
    for dataset in (data, Subset(data, [5, 2, 9, 1]), Subset(Subset(data, range(3, 12)), [0, 4, 8])):
        for options in ({}, {"num_workers": 1}):
            plain = DataLoader(dataset, 3, **options)
            ready = prepare_loader(DataLoader(dataset, 3, **options), seed=1, training=False)
            for given, expected in zip(ready, plain, strict=True):
                assert type(given) is type(expected) is list
                assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(given, expected, strict=True))
    assert not SeededDataset(TensorDataset(torch.zeros(3).as_subclass(Counted)), 1)._rows


WHOLE = """from data.standard_data import StandardData


class Whole(StandardData):
    splits = ("train", "test", "predict")
"""


def batches(dataset: str, **options: Any) -> list[Any]:
    """Two epochs of the training batches of a dataset, and its validation batches."""
    from data import DInterface

    data = DInterface(dataset=dataset, batch_size=50, **options)
    data.setup("fit")
    found = []
    for loader in (data.train_dataloader(), *data.val_dataloader().values()):
        ready = prepare_loader(loader, seed=2, training=True)
        assert not options.get("on_device") or not (ready.num_workers or ready.pin_memory)
        for epoch in range(2):
            start_epoch(ready, 2, epoch)
            found += list(ready)
    return found


@pytest.mark.parametrize("dataset", ["whole", "standard_data"])
@pytest.mark.parametrize("options", [{}, {"balanced_sampling": True}], ids=str)
def test_on_device_gives_the_same_bits(dataset: str, options: dict[str, Any], project: Path) -> None:
    # Of whole, validation samples are a subset of the training samples.
    (project / "data" / "whole.py").write_text(WHOLE)
    usual, there = (batches(dataset, on_device=on_device, **options) for on_device in (False, True))
    assert len(usual) == len(there) > 40
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(usual, there, strict=True))


SHORT = ("--max_epochs", "2", "--limit_train_batches", "5", "--report", "false", "--log_every_n_steps", "1")


def test_a_run_on_the_device_is_the_run(run: Callable) -> None:
    usual, there = run(*SHORT), run(*SHORT, "--on_device", "true")
    assert usual.code == there.code == 0, there.err
    assert usual.metrics == there.metrics
    tested = run("test", "--ckpt_path", "best")
    assert tested.metrics["test_acc"] == there.metrics["test_acc"]
    assert run("predict", "--ckpt_path", "best").code == 0


def test_tensors_are_moved_once_and_the_sets_stay_where_they_are() -> None:
    device, moved = torch.device("meta"), dict[Any, Any]()

    class Mover(StandardData):
        def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
            return self.images[:1], self.targets[:1]

    data = Mover("train")
    parts = [Subset(data, [0, 1]), Subset(samples.plain(data), [2])]
    first, other = (samples.on_device(part, device, moved) for part in parts)
    assert first.dataset.images.device == device and first.dataset.images is other.dataset.images
    assert first.dataset.augment and not other.dataset.augment
    assert data.images.device.type == "cpu" and len(moved) == 2
    elsewhere = copy.copy(data)
    elsewhere.__class__ = StandardData
    elsewhere.images = elsewhere.images.numpy()
    with pytest.raises(MisconfigurationException, match="StandardData.__getitems__ gives tensors on cpu, not on meta"):
        samples.on_device(elsewhere, device, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_same_bits(dtype: torch.dtype) -> None:
    class Images(Drawing):
        def __init__(self) -> None:
            self.images = of_type(dtype)

        def __getitems__(self, indices: list[int]) -> Tensor:
            images = random_flip(random_crop(take(self.images, indices), padding=2))
            return scaled(random_erasing(images))

    usual = SeededDataset(Images(), 5, collate=as_batch)
    there = SeededDataset(samples.on_device(Images(), torch.device("cuda"), {}), 5, collate=as_batch)
    given = there.__getitems__([3, 1, 11])
    assert given.device.type == "cuda" and torch.equal(given.cpu(), usual.__getitems__([3, 1, 11]))


REFUSED = {
    "workers": (("--num_workers", "2"), "on_device=True, num_workers=2: batches are made on the device; leave out"),
    "joined": (("--val_fraction", "0.2"), "--on_device: standard_data is read sample by sample; leave out --on_device"),
    "files": (
        ("--dataset", "csv_data", "--data.file", "table.csv", "--data.image_column", "file", "--data.size", "8"),
        "--on_device: csv_data is read sample by sample",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_on_the_device_is_refused(name: str, run: Callable, tmp_path: Path) -> None:
    lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["file,class", *lines]) + "\n")
    for number in range(40):
        functional.to_pil_image(PIXELS[number]).save(tmp_path / f"{number}.png")
    words, text = REFUSED[name]
    outcome = run(*words, "--on_device", "true", "--fast_dev_run", "true")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and text in outcome.err, outcome.err


def test_a_class_that_reads_samples_in_its_own_way_is_read_by_sample(project: Path) -> None:
    (project / "data" / "dark.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Dark(StandardData):\n"
        "    def __getitem__(self, index):\n        image, target = super().__getitem__(index)\n"
        "        return 0 * image, target\n"
    )
    dark = build_dataset("dark", "train", {})
    assert not samples.makes_batches(dark) and samples.makes_batches(build_dataset("standard_data", "train", {}))
    assert not any(images.any() for images, _ in batches("dark"))


def test_a_lightning_loader_gets_whole_batches_too() -> None:
    data = DInterface(batch_size=50)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (50, 1, 8, 8) and targets.shape == (50,)
    samples_of_first = [data.sets["val"]["standard_data"][index] for index in range(3)]
    images, _ = next(iter(data.val_dataloader()["standard_data"]))
    assert torch.equal(images[:3], torch.stack([image for image, _ in samples_of_first]))


def test_a_bad_sample_of_a_batch_is_named() -> None:
    class Bad(Drawing):
        def __getitems__(self, indices: list[int]) -> Any:
            if 7 in indices:
                raise ValueError("broken")
            return torch.zeros(len(indices), 1)

    with pytest.raises(RuntimeError, match="sample 7 of Bad cannot be read: ValueError: broken"):
        read(Bad())
    assert samples.workers_for(Bad(), 12) == 0

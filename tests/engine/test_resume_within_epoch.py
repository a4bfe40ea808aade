"""A run that goes on from any optimizer step, or from within a validation, ends with the same bits."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import torch
from engine.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from engine.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import Deep, assert_same
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.regression import ExplainedVariance, PearsonCorrCoef
from toy import Net, dataset, loader, trainer

EPOCHS, SAMPLES = 3, 10


class Noisy(Dataset[Any]):
    """Augments with numbers from all three global generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = dataset(SAMPLES)[index]
        return x + torch.rand(()) + random.random() + float(np.random.rand()), y


def blend(samples: list[Any]) -> Any:
    """A collate_fn that draws, as mixup does."""
    x, y = torch.utils.data.default_collate(samples)
    return x + torch.rand(()), y


class Measured(Deep):
    """Deep, with torchmetrics over the training epoch (compute groups among them) and values of all kinds."""

    def __init__(self, scheduler: str = "plateau") -> None:
        super().__init__(scheduler)
        self.all = MetricCollection({"mse": MeanSquaredError(), "ev": ExplainedVariance(), "r": PearsonCorrCoef()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        prediction = self(x).detach()
        self.all.update(prediction.flatten(), y.flatten())
        self.log_dict(self.all, on_step=False, on_epoch=True)
        self.log("largest", float(prediction.max()), on_step=True, on_epoch=True, reduce_fx="max")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch) + torch.rand(()) / 100
        self.log("val_loss", loss)
        self.log("val_step", loss, on_step=True, on_epoch=False)


class SaveEach(engine.Callback):
    """Saves after every batch, before and after validation, and at each epoch's end."""

    def _save(self, trainer: engine.Trainer, moment: str) -> None:
        if not trainer.sanity_checking:
            path = f"each/{trainer.current_epoch}-{trainer.state.batches_done}-{moment}.ckpt"
            trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "batch")

    def on_train_epoch_start(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "start")

    def on_validation_start(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "before")

    def on_validation_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, f"within{args[3]}")

    def on_validation_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "after")


def run(train: Any, ckpt_path: Any = None, callbacks: tuple[Any, ...] = (), **options: Any) -> Any:
    """Train in the folder "run"; returns the state at the end, the text of metrics.csv and all events."""
    engine.seed_everything(5 if ckpt_path is None else 99)
    saver = ModelCheckpoint("run/best", filename="{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    averages = [options.pop("average")(decay=0.9)] if "average" in options else []
    # Before the callback that saves, so that what it saves is up to date.
    callbacks = (*averages, *callbacks)
    part = trainer(
        callbacks=[EarlyStopping("val_loss", patience=99), LearningRateMonitor("step"), saver, *callbacks],
        enable_checkpointing=True,
        logger=[CSVLogger(".", "run", "logs"), TensorBoardLogger(".", "run", "logs")],
        log_every_n_steps=2,
        **{"max_epochs": EPOCHS, "num_sanity_val_steps": 2, **options},
    )
    part.fit(Measured(), train, loader(6, num_workers=0), ckpt_path=ckpt_path)
    part.save_checkpoint("run/end.ckpt")
    events = EventAccumulator("run/logs")
    events.Reload()
    # Files of one second are read in the order of their names.
    scalars = {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    return torch.load("run/end.ckpt", weights_only=True), Path("run/logs/metrics.csv").read_text(), scalars


def check_every_point(make: Any, points: slice = slice(None), **options: Any) -> None:
    """Save at every point of a run, and go on from each of them."""
    whole, text, events = run(make(), callbacks=(SaveEach(),), **options)
    # Before the first batch there is nothing yet to go on from.
    files = sorted(file for file in Path("each").glob("*.ckpt") if file.name != "0-0-start.ckpt")
    assert len(files) >= 3 * EPOCHS
    for file in files[points]:
        resumed, again, events_again = run(make(), ckpt_path=file, callbacks=(SaveEach(),), **options)
        assert_same({**whole, "loggers": 0}, {**resumed, "loggers": 0})
        assert again == text, file
        assert events_again == events, file


NARROW = pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.long)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, NARROW], ids=str)
def test_from_every_point_of_a_run(options: dict[str, Any]) -> None:
    check_every_point(lambda: DataLoader(Noisy(), 2, shuffle=True, collate_fn=blend), **options)


@pytest.mark.long
def test_with_an_average_of_the_weights_and_in_the_background() -> None:
    check_every_point(
        lambda: DataLoader(Noisy(), 2, shuffle=True), slice(None, None, 2), average=EMAWeightAveraging, async_save=True
    )


def test_with_other_numbers_of_workers() -> None:
    counts = iter([0, *([2, 0, 1] * 99)])
    check_every_point(
        lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=next(counts), collate_fn=blend), slice(None, None, 5)
    )


class Backwards(Sampler[int]):
    """A sampler of the user's own, with an order drawn from Python's global numbers."""

    def __iter__(self) -> Iterator[int]:
        order = [*range(SAMPLES)]
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SAMPLES


class Stream(IterableDataset[Any]):
    """Samples without a length, in an order drawn anew for every epoch."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(SAMPLES).tolist():
            yield Noisy()[index]


class Remembers(IterableDataset[Any]):
    """Goes on where it stopped, on its own: its order is drawn from a generator that nobody else sees."""

    def __init__(self) -> None:
        self.random, self.left = random.Random(3), list[int]()

    def __iter__(self) -> Iterator[Any]:
        if not self.left:
            self.left = self.random.sample(range(SAMPLES), SAMPLES)
        while self.left:
            yield Noisy()[self.left.pop()]

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]
        self.random.setstate(state["random"])


class Batches:
    """Any iterable is a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


LOADERS = {
    "weighted": lambda: DataLoader(Noisy(), 2, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
    "subset": lambda: DataLoader(Noisy(), 2, sampler=SubsetRandomSampler(range(SAMPLES))),
    "replacement": lambda: DataLoader(Noisy(), 2, sampler=RandomSampler(Noisy(), replacement=True)),
    "own": lambda: DataLoader(Noisy(), 2, sampler=Backwards()),
    "own, worker": lambda: DataLoader(Noisy(), 2, sampler=Backwards(), num_workers=1),
    "stream": lambda: DataLoader(Stream(), 2),
    "stream, worker": lambda: DataLoader(Stream(), 2, num_workers=1),
    "keeps state": lambda: DataLoader(Remembers(), 2),
    "torchdata": lambda: StatefulDataLoader(Noisy(), 2, shuffle=True),
    "torchdata, worker": lambda: StatefulDataLoader(dataset(SAMPLES), 2, shuffle=True, num_workers=1),
    "torchdata, stream": lambda: StatefulDataLoader(Remembers(), 2),
    "list": lambda: Batches([(torch.full((2, 3), n / 9), torch.tensor([[n], [1.0]])) for n in range(5)]),
}
SLOW = ("own, worker", "stream, worker", "torchdata", "torchdata, worker", "torchdata, stream")
KINDS = [pytest.param(kind, marks=pytest.mark.long if kind in SLOW else ()) for kind in LOADERS]


@pytest.mark.filterwarnings("ignore:.*after a resume within")
@pytest.mark.parametrize("kind", KINDS)
def test_with_every_kind_of_loader(kind: str) -> None:
    check_every_point(LOADERS[kind], slice(None, None, 2))


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (lambda: DataLoader(Noisy(), 2, shuffle=True), None),
        (lambda: DataLoader(Noisy(), 2, sampler=SubsetRandomSampler(range(SAMPLES))), None),
        (lambda: DataLoader(Remembers(), 2), None),
        (lambda: StatefulDataLoader(Noisy(), 2, shuffle=True), None),
        (lambda: DataLoader(Noisy(), 2, sampler=Backwards()), "Backwards is read again from the epoch's start"),
        (lambda: DataLoader(Stream(), 2), "Stream is read again"),
        (lambda: Batches([dataset(2).tensors]), "Batches is read again"),
        (lambda: StatefulDataLoader(Noisy(), 2, num_workers=1), "StatefulDataLoader: .* its workers draw are not in"),
    ],
)
def test_what_may_not_be_exact_says_so_at_the_start(
    train: Any, told: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    trainer(max_steps=1).fit(Net(), train())
    messages = [str(warning.message) for warning in recwarn if "after a resume" in str(warning.message)]
    assert len(messages) == (told is not None)
    assert told is None or re.match(told, messages[0])


def test_a_loader_with_a_state_that_is_cut_short_says_so(recwarn: pytest.WarningsRecorder) -> None:
    trainer(limit_train_batches=1).fit(Net(), DataLoader(Remembers(), 2))
    assert "Remembers is cut short by limit_train_batches" in str([warning.message for warning in recwarn])

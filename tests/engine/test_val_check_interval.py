"""When validation runs, against Lightning itself; and a run that goes on from around such a validation."""

from __future__ import annotations

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EarlyStopping, ModelCheckpoint
from engine.loggers import CSVLogger
from injection import at, time_limit
from test_resume import Deep, assert_same
from torch.optim.lr_scheduler import ReduceLROnPlateau
from toy import Net, loader, stream, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning

# Batches of an epoch.
BATCHES = 8


def validations(pl: Any, train: Any, **options: Any) -> list[int]:
    """Batches trained, over all epochs, when each validation began."""
    seen: list[int] = []

    class Counts(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.batches = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batches += 1
            if self.batches == options.get("stop_at"):
                self.trainer.should_stop = True
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_start(self) -> None:
            seen.append(self.batches)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    given = {key: value for key, value in options.items() if key != "stop_at"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(**{**quiet, "max_epochs": 3, **given}).fit(Counts(), train(), loader(2))
    return seen


def sized() -> Any:
    return loader(2 * BATCHES)


def unsized() -> Any:
    return stream(2 * BATCHES)


# What is known of Lightning (facts), beside running it.
KNOWN: list[tuple[Any, dict[str, Any], list[int]]] = [
    (sized, {}, [8, 16, 24]),
    (sized, {"val_check_interval": 1.0}, [8, 16, 24]),
    (sized, {"val_check_interval": 0.25}, [*range(2, 25, 2)]),
    (sized, {"val_check_interval": 0.3}, [*range(2, 25, 2)]),
    (sized, {"val_check_interval": 0.01}, [*range(1, 25)]),
    (sized, {"val_check_interval": 0.99}, [7, 15, 23]),
    (sized, {"val_check_interval": 3}, [3, 6, 11, 14, 19, 22]),
    (sized, {"val_check_interval": 8}, [8, 16, 24]),
    (sized, {"val_check_interval": 1}, [*range(1, 25)]),
    (sized, {"check_val_every_n_epoch": None}, [8, 16, 24]),
    (sized, {"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10, 15, 20]),
    (sized, {"val_check_interval": 11, "check_val_every_n_epoch": None}, [11, 22]),
    (sized, {"val_check_interval": 25, "check_val_every_n_epoch": None}, []),
    (sized, {"check_val_every_n_epoch": 2}, [16]),
    (sized, {"val_check_interval": 4, "check_val_every_n_epoch": 2}, [12, 16]),
    (sized, {"val_check_interval": 0.5, "check_val_every_n_epoch": 3}, [20, 24]),
    (sized, {"val_check_interval": 3, "accumulate_grad_batches": 2}, [3, 6, 11, 14, 19, 22]),
    (sized, {"val_check_interval": 0.5, "limit_train_batches": 5}, [2, 4, 7, 9, 12, 14]),
    (sized, {"val_check_interval": 2, "limit_train_batches": 0.5}, [2, 4, 6, 8, 10, 12]),
    (sized, {"val_check_interval": 3, "stop_at": 10}, [3, 6, 10]),
    (sized, {"val_check_interval": 3, "stop_at": 10, "min_epochs": 2}, [3, 6, 11, 14]),
    (sized, {"val_check_interval": 3, "max_steps": 6}, [3, 6]),
    (sized, {"val_check_interval": 3, "max_steps": 8, "limit_val_batches": 0}, []),
    (sized, {"val_check_interval": timedelta(days=1)}, []),
    (sized, {"val_check_interval": "01:00:00:00", "check_val_every_n_epoch": None}, []),
    (sized, {"val_check_interval": {"microseconds": 1}}, [*range(1, 25)]),
    (sized, {"val_check_interval": {"microseconds": 1}, "check_val_every_n_epoch": 2}, [*range(9, 17)]),
    (unsized, {}, [8, 16, 24]),
    (unsized, {"val_check_interval": 3}, [3, 6, 11, 14, 19, 22]),
    (unsized, {"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10, 15, 20]),
    (unsized, {"check_val_every_n_epoch": 2}, [16]),
    (unsized, {"limit_train_batches": 5}, [5, 10, 15]),
    (unsized, {"limit_train_batches": 5, "val_check_interval": 2}, [2, 4, 7, 9, 12, 14]),
    (unsized, {"val_check_interval": {"microseconds": 1}, "max_epochs": 1}, [*range(1, 9)]),
]


@pytest.mark.parametrize(("train", "options", "expected"), KNOWN, ids=lambda part: getattr(part, "__name__", str(part)))
def test_validation_runs_when_it_does_in_lightning(train: Any, options: dict[str, Any], expected: list[int]) -> None:
    assert validations(engine, train, **options) == expected
    assert validations(pytorch_lightning, train, **options) == expected


@pytest.mark.parametrize(
    ("train", "options"),
    [
        (sized, {"val_check_interval": 9}),
        (sized, {"val_check_interval": 1.5}),
        (sized, {"val_check_interval": 0.5, "check_val_every_n_epoch": None}),
        (sized, {"val_check_interval": "15 minutes"}),
        (unsized, {"val_check_interval": 0.5}),
    ],
)
def test_what_lightning_refuses_is_refused_here_in_one_line(train: Any, options: dict[str, Any]) -> None:
    with pytest.raises(engine.MisconfigurationException) as caught:
        validations(engine, train, **options)
    assert "\n" not in str(caught.value) and "val" in str(caught.value)
    with pytest.raises((pytorch_lightning.utilities.exceptions.MisconfigurationException, ValueError)):
        validations(pytorch_lightning, train, **options)


def test_a_run_that_max_steps_ends_within_an_epoch_validates_at_its_end_unlike_lightning() -> None:
    assert validations(engine, sized, val_check_interval=3, max_steps=4) == [3, 4]
    assert validations(pytorch_lightning, sized, val_check_interval=3, max_steps=4) == [3]


def test_a_time_interval_counts_from_the_last_validation() -> None:
    begun: list[float] = []

    class Slow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            begun.append(time.monotonic())
            time.sleep(0.1)

    trainer(max_epochs=2, val_check_interval={"milliseconds": 90}).fit(Slow(), loader(16), loader(2))
    assert 2 <= len(begun) <= 4
    assert all(later - earlier >= 0.19 for earlier, later in zip(begun[:-1], begun[1:], strict=True))


def test_weights_do_not_depend_on_when_validation_runs() -> None:
    ends = []
    for options in ({}, {"val_check_interval": 1}, {"val_check_interval": 3, "check_val_every_n_epoch": None}):
        engine.seed_everything(4)
        model = Deep()
        trainer(max_epochs=2, accumulate_grad_batches=2, **options).fit(model, loader(16, shuffle=True), loader(4))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert ends[0].equal(ends[1]) and ends[0].equal(ends[2])


# Exactness


class Drawing(Deep):
    """Follows its validation by a plateau after every step that brought one; validation draws random numbers."""

    def __init__(self, interval: str) -> None:
        super().__init__()
        self.interval = interval

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        noise = torch.rand(())
        self.log("val_loss", self.loss(batch) + noise)
        self.log("val_step", noise, on_step=True, on_epoch=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.9, patience=1)
        options = {"monitor": "val_loss", "interval": self.interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **options}}


class SaveEach(engine.Callback):
    """Saves after every batch, before and within every validation, and at each epoch's ends."""

    def _save(self, trainer: engine.Trainer, moment: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"each/{trainer.state.total_batches:02d}-{moment}.ckpt")

    def on_train_epoch_start(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "start")

    def on_train_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_start(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "before")

    def on_validation_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, f"within{args[3]}")

    def on_train_epoch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        self._save(trainer, "stop")


def run(interval: str, ckpt_path: Any = None, callbacks: tuple[Any, ...] = (), **options: Any) -> dict[str, Any]:
    """Train in the folder "run"; returns the whole state at the end, and the text of metrics.csv as "csv"."""
    engine.seed_everything(5 if ckpt_path is None else 99)
    # After every validation.
    saver = ModelCheckpoint("run/c", "{step}", monitor="val_loss", save_top_k=-1, save_last=True)
    part = trainer(
        callbacks=[EarlyStopping("val_loss", patience=99), saver, *callbacks],
        enable_checkpointing=True,
        logger=CSVLogger(".", "run", "logs"),
        log_every_n_steps=2,
        **{"max_epochs": 2, "num_sanity_val_steps": 1, **options},
    )
    part.fit(Drawing(interval), loader(10, shuffle=True), loader(4), ckpt_path=ckpt_path)
    part.save_checkpoint("run/end.ckpt")
    end = torch.load("run/end.ckpt", weights_only=True)
    return {**end, "csv": Path("run/logs/metrics.csv").read_text()}


# An epoch has 5 batches: validation within windows of accumulated gradients, at their ends, and across epochs.
WITHIN: list[dict[str, Any]] = [
    {"val_check_interval": 2},
    {"val_check_interval": 0.5, "check_val_every_n_epoch": 2},
    {"val_check_interval": 3, "check_val_every_n_epoch": None},
    {"val_check_interval": 3, "accumulate_grad_batches": 2},
    {"val_check_interval": 2, "accumulate_grad_batches": 4, "check_val_every_n_epoch": None},
]


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau watches")
@pytest.mark.parametrize(
    ("number", "interval"), [*((number, "step") for number in range(len(WITHIN))), (2, "epoch"), (3, "epoch")]
)
def test_going_on_from_any_point_changes_no_bit(number: int, interval: str) -> None:
    options = WITHIN[number]
    whole = run(interval, callbacks=(SaveEach(),), **options)
    files = sorted(file for file in Path("each").glob("*.ckpt") if file.name != "00-start.ckpt")
    validated = sorted(Path("run/c").glob("step*.ckpt"))
    assert any("within" in file.name for file in files) and len(files) > 12 and len(validated) > 1
    for file in (*files[number::6], *validated[:-1:2]):
        resumed = run(interval, file, (SaveEach(),), **options)
        assert resumed["csv"] == whole["csv"], file
        assert_same(whole, resumed)


MOMENTS = [("on_validation_start", 2), ("on_validation_batch_start", 2), ("on_validation_batch_end", 1)]
MOMENTS += [("on_validation_batch_end", 2), ("on_validation_end", 2), ("on_train_batch_end", 3)]


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau watches")
@pytest.mark.parametrize(("hook", "when"), MOMENTS)
@pytest.mark.parametrize("options", [WITHIN[0], *WITHIN[2:]], ids=str)
def test_a_signal_around_a_validation_within_an_epoch_loses_no_bit(
    options: dict[str, Any], hook: str, when: int
) -> None:
    # Callbacks keep their states by class and place.
    whole = run("step", callbacks=(at("on_fit_start", 0, print),), **options)
    for file in Path("run").rglob("*.*"):
        file.unlink()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop = at(hook, when, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with time_limit(), pytest.raises(SystemExit):
        run("step", callbacks=(stop,), **options)
    signal.signal(signal.SIGTERM, before)
    assert_same(whole, run("step", "run/c/last.ckpt", (at("on_fit_start", 0, print),), **options))

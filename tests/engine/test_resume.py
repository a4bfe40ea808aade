"""A run that is resumed at the end of an epoch ends with the same bits as one that was never interrupted."""

from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from engine.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torchmetrics import MeanMetric
from toy import Net, loader, same_bits, trainer, weights

EPOCHS = 4
CHECKPOINTS = {"enable_checkpointing": True}
SCHEDULERS: dict[str, Any] = {
    "none": lambda o: o,
    "one cycle": lambda o: ([o], [{"scheduler": OneCycleLR(o, 0.1, total_steps=EPOCHS * 5), "interval": "step"}]),
    "plateau": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(o, factor=0.3, patience=0), "monitor": "train_loss_epoch"},
    },
    "cosine": lambda o: ([o], [CosineAnnealingLR(o, EPOCHS)]),
    "milestones": lambda o: ([o], [MultiStepLR(o, [1, 3])]),
    "sequence": lambda o: ([o], [SequentialLR(o, [StepLR(o, 1), CosineAnnealingLR(o, 9)], [2])]),
}


class Deep(Net):
    """With dropout, batch norm and an adaptive optimizer, so that every kind of state matters."""

    def __init__(self, scheduler: str = "none") -> None:
        super().__init__()
        self.scheduler = scheduler
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return SCHEDULERS[self.scheduler](torch.optim.AdamW(self.parameters(), lr=0.05))


def run(name: str, scheduler: str, ckpt_path: Path | None = None, workers: int = 0, **options: Any) -> dict[str, Any]:
    """Train in the folder `name`, from the start or from a checkpoint; returns the whole state at the end."""
    # A resumed process has drawn other numbers before.
    engine.seed_everything(5 if ckpt_path is None else 99)
    stopping = EarlyStopping("val_loss", patience=99)
    saver = ModelCheckpoint(f"{name}/checkpoints", filename="{epoch}", monitor="val_loss", save_top_k=-1)
    part = trainer(
        callbacks=[stopping, LearningRateMonitor(), saver],
        enable_checkpointing=True,
        logger=CSVLogger(".", name, "run"),
        log_every_n_steps=2,
        **{"max_epochs": EPOCHS, "num_sanity_val_steps": 2, **options},
    )
    model = Deep(scheduler)
    part.fit(model, loader(10, shuffle=True, num_workers=workers), loader(6), ckpt_path=ckpt_path)
    part.save_checkpoint(f"{name}/end.ckpt")
    return torch.load(f"{name}/end.ckpt", weights_only=True)


def rows(name: str) -> list[dict[str, str]]:
    with open(Path(name, "run", "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def assert_same(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert whole.keys() == resumed.keys()
    for key in whole.keys() - {"callbacks"}:
        assert same_bits(whole[key], resumed[key]), f"{key} differs"
    assert [*whole["callbacks"]] == [*resumed["callbacks"]]
    for key in whole["callbacks"]:
        assert same_bits(whole["callbacks"][key], resumed["callbacks"][key]), f"{key} differs"


CASES = [
    *((scheduler, {}) for scheduler in SCHEDULERS),
    *(("one cycle", {"precision": precision}) for precision in ("bf16-mixed", "16-mixed")),
    ("plateau", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ("cosine", {"workers": 2}),
]


# Under fp16 the first steps are skipped until the loss scale is low enough; torch takes that for a wrong order.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize(
    ("scheduler", "options", "epoch"),
    [(scheduler, options, epoch) for scheduler, options in CASES for epoch in (0, 1, 2)]
    + [("cosine", {"check_val_every_n_epoch": 2}, 1)],
    ids=str,
)
def test_resuming_changes_no_bit(scheduler: str, options: dict[str, Any], epoch: int) -> None:
    whole = run("whole", scheduler, **options)
    before = rows("whole")
    # The same folder, as when a killed run goes on: what came after the checkpoint is there already.
    resumed = run("whole", scheduler, Path(f"whole/checkpoints/epoch={epoch}.ckpt"), **options)
    assert_same(whole, resumed)
    assert rows("whole") == before


def test_resuming_without_workers_what_was_trained_with_them_changes_no_bit() -> None:
    whole = run("whole", "cosine", workers=2)
    assert_same(whole, run("whole", "cosine", Path("whole/checkpoints/epoch=1.ckpt"), workers=0))


def test_early_stopping_goes_on_counting() -> None:
    def stop_at(name: str, ckpt_path: str | None = None) -> tuple[int, dict[str, Any]]:
        class Worse(Net):
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
                self.log("val_loss", float(self.current_epoch))

        stopping = EarlyStopping("val_loss", patience=3)
        saver = ModelCheckpoint(name, save_top_k=-1, filename="{epoch}")
        part = trainer(callbacks=[stopping, saver], enable_checkpointing=True, max_epochs=9)
        part.fit(Worse(), loader(), loader(), ckpt_path=ckpt_path)
        return part.current_epoch, stopping.state_dict()

    assert stop_at("whole")[0] == 4
    assert stop_at("again", "whole/epoch=1.ckpt") == stop_at("whole")


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (3, 4)])
def test_a_run_that_stopped_early_goes_on_only_with_more_patience(patience: int, epochs: int) -> None:
    class Worse(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", float(self.current_epoch))

    def fit(patience: int, ckpt_path: str | None = None) -> int:
        saver = ModelCheckpoint("c", save_top_k=0, save_last=True)
        part = trainer(callbacks=[EarlyStopping("val_loss", patience=patience), saver], max_epochs=9, **CHECKPOINTS)
        part.fit(Worse(), loader(), loader(), ckpt_path=ckpt_path)
        return part.current_epoch

    assert fit(1) == 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fit(patience, "c/last.ckpt") == epochs
    assert ("had stopped by itself" in str([warning.message for warning in told])) == (patience == 1)


def test_the_data_modules_state_and_the_models_additions_come_back() -> None:
    class Data(engine.DataModule):
        value = 0

        def train_dataloader(self) -> Any:
            return loader()

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.value = state_dict["value"]

    class Counts(engine.Callback):
        batches = 0
        notes: list[str] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.batches = state_dict["batches"]

    data = Data()
    data.value = 7
    first = trainer(callbacks=Counts())
    first.fit(Net(), datamodule=data)
    first.save_checkpoint("a.ckpt")
    again, counts = Data(), Counts()
    trainer(callbacks=counts, max_epochs=2).fit(Net(), datamodule=again, ckpt_path="a.ckpt")
    assert (again.value, counts.batches) == (7, 8)


def test_best_and_last_name_the_files_of_this_trainer() -> None:
    saver = ModelCheckpoint("c", filename="{epoch}", monitor="val_loss", mode="max", save_last=True)
    part = trainer(callbacks=saver, enable_checkpointing=True, max_epochs=3)
    model = Net()
    part.fit(model, loader(), loader())
    end = weights(model)
    part.validate(model, loader(), ckpt_path="best", verbose=False)
    assert Path(saver.best_model_path).name == "epoch=0.ckpt" and not weights(model).equal(end)
    part.test(model, loader(), ckpt_path="last", verbose=False)
    assert weights(model).equal(end)


def test_resuming_at_the_last_epoch_trains_no_more() -> None:
    first = trainer()
    first.fit(Net(), loader())
    first.save_checkpoint("a.ckpt")
    model = Net()
    again = trainer()
    again.fit(model, loader(), ckpt_path="a.ckpt")
    assert (model.count("train"), again.current_epoch, again.global_step) == (0, 1, 4)
    assert weights(model).equal(weights(first.module))


def test_other_optimization_than_saved_is_refused() -> None:
    class Schedulerless(Deep):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    run("whole", "cosine", max_epochs=1)
    with pytest.raises(engine.MisconfigurationException, match="has 1 lr_schedulers, this run has 0"):
        trainer(max_epochs=2).fit(Schedulerless(), loader(), ckpt_path="whole/end.ckpt")


def test_drawing_in_train_dataloader_does_not_shift_the_resumed_run() -> None:
    class Draws(Deep):
        def train_dataloader(self) -> Any:
            torch.rand(3)
            return loader(10, shuffle=True)

    def train(epochs: int, ckpt_path: str | None = None) -> Any:
        engine.seed_everything(5)
        part, model = trainer(max_epochs=epochs), Draws()
        part.fit(model, ckpt_path=ckpt_path)
        part.save_checkpoint(f"{epochs}.ckpt")
        return weights(model)

    whole = train(3)
    train(2)
    assert train(3, "2.ckpt").equal(whole)


KILLED = """
import os, sys
sys.path[:0] = [{engine!r}, {tests!r}]
import test_resume
from toy import *

class Killed(test_resume.Deep):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (2, 2):
            os._exit(9)

test_resume.Deep = Killed
test_resume.run("killed", "one cycle")
"""


def test_a_killed_run_resumes_to_the_same_bits_and_the_same_metrics_csv(tmp_path: Path) -> None:
    whole = run("whole", "one cycle")
    folders = {"engine": str(Path(engine.__file__).parents[1]), "tests": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED.format(**folders)], cwd=tmp_path)
    assert done.returncode == 9
    assert not Path("killed/checkpoints/epoch=2.ckpt").exists()
    assert_same(whole, run("killed", "one cycle", Path("killed/checkpoints/epoch=1.ckpt")))
    assert rows("killed") == rows("whole")

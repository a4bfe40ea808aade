"""Loggers: what lies on disk, read back by those it is meant for."""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import LearningRateMonitor
from engine.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import StepLR
from toy import Memory, Net, fit, loader, trainer


def read(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_a_row_per_log_step_with_steps_from_zero() -> None:
    logger = CSVLogger(".", "n", "v")
    fit(Net(), None, loader(), logger=logger, log_every_n_steps=2, max_epochs=2)
    rows = read("n/v/metrics.csv")
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "3", "5", "7"]
    assert [(row["step"], row["epoch"]) for row in rows if row["val_loss"]] == [("3", "0"), ("7", "1")]
    assert all(re.fullmatch(r"\d+\.\d+(e-\d+)?|", row[name]) for row in rows for name in ("train_loss", "val_loss"))


def test_the_csv_keeps_all_digits() -> None:
    logger = CSVLogger(".", "n", "v")
    logger.log_metrics({"x": 0.1 + 0.2}, 0)
    logger.save()
    assert float(read("n/v/metrics.csv")[0]["x"]) == 0.1 + 0.2


def test_new_columns_are_added_and_names_are_quoted() -> None:
    logger = CSVLogger(".", "n", "v")
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({'b,"c"\n': 2.0}, 1)
    logger.finalize("success")
    assert read("n/v/metrics.csv") == [
        {"step": "0", "a": "1.0", 'b,"c"\n': ""},
        {"step": "1", "a": "", 'b,"c"\n': "2.0"},
    ]
    assert os.listdir("n/v") == ["metrics.csv"]


def test_a_csv_is_continued_and_cut_where_the_run_goes_on() -> None:
    for values in ([0.0, 1.0, 2.0, 3.0], [20.0, 30.0]):
        logger = CSVLogger(".", "n", "v")
        if values[0]:
            logger.load_state_dict({"rows": 2})
        for step, value in enumerate(values, start=4 - len(values)):
            logger.log_metrics({"x": value}, step)
        logger.finalize("success")
    assert [(row["step"], row["x"]) for row in read("n/v/metrics.csv")] == [
        *(("0", "0.0"), ("1", "1.0"), ("2", "20.0"), ("3", "30.0")),
    ]


def test_half_a_row_of_a_killed_run_is_dropped() -> None:
    Path("n/v").mkdir(parents=True)
    Path("n/v/metrics.csv").write_text("step,x\n10,1.0\n11,1.0\n1")
    logger = CSVLogger(".", "n", "v")
    logger.load_state_dict({"rows": 1})
    logger.log_metrics({"x": 2.0}, 11)
    logger.finalize("success")
    assert [(row["step"], row["x"]) for row in read("n/v/metrics.csv")] == [("10", "1.0"), ("11", "2.0")]


def test_a_logged_value_named_step_does_not_break_a_resumed_run() -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("step", 2.0 * batch_idx)
            return super().training_step(batch, batch_idx)

    run = fit(Odd(), logger=CSVLogger(".", "n", "v"), log_every_n_steps=1)
    run.save_checkpoint("a.ckpt")
    again = trainer(logger=CSVLogger(".", "n", "v"), log_every_n_steps=1, max_epochs=2)
    again.fit(Odd(), loader(), ckpt_path="a.ckpt")
    assert again.global_step == 8


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_logged() -> None:
    logger, memory = TensorBoardLogger(".", "n", "v"), Memory()
    fit(Net(lr=0.3), None, loader(), logger=[logger, memory], log_every_n_steps=2, max_epochs=2)
    logged = scalars("n/v")
    assert set(logged) == {"train_loss", "val_loss", "epoch"}
    for name in ("train_loss", "val_loss"):
        expected = memory.of(name)
        assert [step for step, _ in logged[name]] == [step for step, _ in expected]
        assert [value for _, value in logged[name]] == pytest.approx([value for _, value in expected])


def test_tensorboard_shows_hyper_parameters() -> None:
    fit(Net(lr=0.3), logger=TensorBoardLogger(".", "n", "v"))
    events = EventAccumulator("n/v")
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"lr" in content


def test_tensorboard_after_a_resume_has_no_doubled_steps() -> None:
    class Saves(engine.Callback):
        def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint("a.ckpt")

    fit(Net(), logger=TensorBoardLogger(".", "n", "v"), callbacks=Saves(), log_every_n_steps=1, max_epochs=2)
    again = trainer(logger=TensorBoardLogger(".", "n", "v"), log_every_n_steps=1, max_epochs=3)
    again.fit(Net(), loader(), ckpt_path="a.ckpt")
    # Files of one second are read in the order of their names.
    assert sorted(step for step, _ in scalars("n/v")["train_loss"]) == [*range(12)]


def test_the_experiment_is_a_summary_writer_for_pictures() -> None:
    class Draws(Net):
        def on_train_end(self) -> None:
            assert self.logger is not None
            self.logger.experiment.add_image("picture", torch.zeros(3, 2, 2))

    fit(Draws(), logger=TensorBoardLogger(".", "n", "v"))
    events = EventAccumulator("n/v")
    events.Reload()
    assert events.Tags()["images"] == ["picture"]


def test_two_loggers_share_a_folder() -> None:
    tensorboard = TensorBoardLogger("logs", "n")
    table = CSVLogger("logs", "n", tensorboard.version)
    fit(Net(), logger=[tensorboard, table], log_every_n_steps=1)
    assert len(os.listdir("logs/n/version_0")) == 2


def test_versions_count_up_and_gaps_stay() -> None:
    for name in ("version_0", "version_4", "version_x", "other"):
        Path("logs/n", name).mkdir(parents=True)
    loggers = [CSVLogger("logs", "n") for _ in range(3)]
    assert [logger.version for logger in loggers] == [5, 6, 7]
    assert [logger.version for logger in loggers] == [5, 6, 7]


def test_runs_started_at_once_get_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: CSVLogger("logs", "n").version, range(40)))
    assert sorted(versions) == [*range(40)]


def test_processes_started_at_once_get_folders_of_their_own() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        versions = pool.map(claim, range(20), chunksize=1)
    assert sorted(versions) == [*range(20)]


def claim(_: int) -> Any:
    return CSVLogger("logs", "n").version


def test_the_default_logger_is_tensorboard_in_the_root_folder() -> None:
    run = trainer(logger=True, default_root_dir="root")
    run.fit(Net(), loader(2))
    assert isinstance(run.logger, TensorBoardLogger)
    assert run.log_dir == str(Path("root/lightning_logs/version_0"))
    assert len(os.listdir(run.log_dir)) == 1


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").touch()
    with pytest.raises(engine.MisconfigurationException, match="folder file/n cannot be made.*choose another"):
        fit(Net(), logger=CSVLogger("file", "n"))


def scheduled(groups: int = 1, **options: Any) -> Net:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            parts = list(self.parameters())
            optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0} for p in parts[:groups]])
            return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", **options}]

    return Scheduled()


@pytest.mark.parametrize(
    ("interval", "accumulate", "expected"),
    [
        ("step", 1, [(1, 0.5), (3, 0.125), (5, 2**-5), (7, 2**-7)]),
        ("step", 2, [(1, 0.5), (3, 0.125)]),
        ("epoch", 1, [(0, 1.0), (4, 2**-4)]),
    ],
)
def test_the_learning_rate_in_use_is_logged(interval: Any, accumulate: int, expected: Any) -> None:
    logger = Memory()
    options = {"log_every_n_steps": 2, "max_epochs": 2, "accumulate_grad_batches": accumulate}
    fit(scheduled(), logger=logger, callbacks=LearningRateMonitor(interval), **options)
    assert logger.of("lr-SGD") == expected


def test_learning_rates_of_groups_and_named_schedulers() -> None:
    logger = Memory()
    fit(scheduled(2), logger=logger, callbacks=LearningRateMonitor(), log_every_n_steps=4)
    assert {n for _, row in logger.rows for n in row} >= {"lr-SGD/pg1", "lr-SGD/pg2"}
    logger = Memory()
    fit(scheduled(name="rate"), logger=logger, callbacks=LearningRateMonitor("epoch"))
    assert logger.of("rate") == [(0, 1.0)]

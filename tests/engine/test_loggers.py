"""Loggers: what lies on disk, read back by those it is meant for."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import pytorch_lightning
import torch
from engine.callbacks import LearningRateMonitor
from engine.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.optim.lr_scheduler import StepLR
from toy import Memory, Net, fit, loader, trainer, weights


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
    assert set(logged) == {"train_loss", "val_loss", "epoch", "hp_metric"}
    for name in ("train_loss", "val_loss"):
        expected = memory.of(name)
        assert [step for step, _ in logged[name]] == [step for step, _ in expected]
        assert [value for _, value in logged[name]] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize("given", [{}, {"flush_secs": 60}])
def test_an_event_is_in_the_file_once_it_is_logged_unless_a_thread_is_asked_for(given: dict[str, Any]) -> None:
    def writers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if type(thread).__name__ == "_AsyncWriterThread"}

    before, logger = writers(), TensorBoardLogger(".", "n", "v", **given)
    for step in range(3):
        logger.log_metrics({"x": float(step)}, step)
        if not given:
            assert scalars("n/v")["x"] == [(s, s) for s in range(step + 1)]
    assert len(writers() - before) == len(given)
    logger.experiment.add_text("t", "text")
    logger.finalize("success")
    logger.log_metrics({"y": 1.0}, 4)
    logger.finalize("success")
    assert scalars("n/v") == {"x": [(s, s) for s in range(3)], "y": [(4, 1.0)]}
    assert "t/text_summary" in EventAccumulator("n/v").Reload().Tags()["tensors"] and writers() <= before


class Nested:
    def __repr__(self) -> str:
        return "nested"


HPARAMS = {"lr": 0.3, "on": True, "name": "x", "sizes": [1, 2], "conf": {"a": 1, "b": {"c": 2.5}}, "odd": Nested()}
HPARAMS |= {"array": np.float32(0.5), "pair": (1, 2), "none": None, "space": argparse.Namespace(d=4)}


def hparams_page(folder: str) -> Any:
    """What TensorBoard's HPARAMS page gets: values of hyper-parameters, and names of metrics."""
    events = EventAccumulator(folder)
    events.Reload()
    started = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    values = {
        name: value.string_value or value.bool_value or value.number_value for name, value in started.hparams.items()
    }
    experiment = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    return values, [info.name.tag for info in experiment.experiment.metric_infos]


@pytest.mark.parametrize(
    "arguments", [(HPARAMS,), (HPARAMS, {"acc": 0.5, "loss": 2}, 3), (HPARAMS, 0.5), (argparse.Namespace(**HPARAMS),)]
)
def test_tensorboard_shows_hyper_parameters_as_lightning_does(arguments: Any) -> None:
    for loggers, name in ((engine.loggers, "own"), (pytorch_lightning.loggers, "theirs")):
        logger = loggers.TensorBoardLogger(".", name, "v")
        logger.log_hyperparams(*arguments)
        logger.finalize("success")
    assert hparams_page("own/v") == hparams_page("theirs/v")
    assert scalars("own/v") == scalars("theirs/v") != {}
    assert hparams_page("own/v")[0]["conf/b/c"] == 2.5


def test_hyper_parameters_lie_in_a_yaml_file_that_lightning_reads() -> None:
    for kind in (TensorBoardLogger, CSVLogger):
        logger = kind(".", kind.__name__, "v")
        logger.log_hyperparams(HPARAMS)
        logger.log_hyperparams({"lr": 0.5, "more": "ä"})
        logger.finalize("success")
        file = Path(kind.__name__, "v", "hparams.yaml")
        expected = {k: v for k, v in HPARAMS.items() if k not in ("odd", "space", "array")} | {"lr": 0.5, "more": "ä"}
        assert pytorch_lightning.core.saving.load_hparams_from_yaml(file) == expected
        assert not list(file.parent.glob("*.tmp"))


@pytest.mark.parametrize("default", [True, False])
def test_a_placeholder_metric_comes_with_hyper_parameters_unless_told_otherwise(default: bool) -> None:
    for loggers, name in ((engine.loggers, "own"), (pytorch_lightning.loggers, "theirs")):
        logger = loggers.TensorBoardLogger(".", name, "v", default_hp_metric=default)
        logger.log_hyperparams({"lr": 0.3})
        logger.log_metrics({"x": 1.0}, 0)
        logger.finalize("success")
    assert scalars("own/v") == scalars("theirs/v")
    assert ("hp_metric" in scalars("own/v")) == default


ARGUMENTS: list[dict[str, Any]] = [
    {"name": "n", "version": 3},
    {"name": "", "version": "v"},
    {"name": None, "version": "v"},
    {"version": "v", "prefix": "p"},
]
SUB_DIRS = [{"name": "n", "version": "v", "sub_dir": "s/t"}, {"version": 0, "sub_dir": Path("s"), "max_queue": 1}]


@pytest.mark.parametrize("where", ["logs", "~/logs", "$PLACE/logs"])
@pytest.mark.parametrize("options", [*ARGUMENTS, *SUB_DIRS])
def test_tensorboard_takes_lightnings_arguments(
    options: dict[str, Any], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for loggers in (engine.loggers, pytorch_lightning.loggers):
        home = tmp_path / loggers.__name__
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("PLACE", str(home))
        home.mkdir()
        monkeypatch.chdir(home)
        logger = loggers.TensorBoardLogger(where, **options)
        logger.log_metrics({"x": torch.tensor(1.5), "many": {"a": 1.0, "b": 2.0}}, step=2)
        logger.experiment.add_scalar("own", 3, 4)
        logger.finalize("success")
        folder = str(Path(logger.log_dir))
        places = [Path(logger.save_dir), Path(logger.root_dir), folder.replace(str(home), ""), logger.name]
        found = {str(file.parent.relative_to(home)) for file in home.rglob("events*")}
        seen.append((places, logger.version, logger.group_separator, logger.sub_dir, scalars(folder), found))
    assert seen[0] == seen[1] and seen[0][4]


@pytest.mark.parametrize("options", ARGUMENTS)
def test_csv_takes_lightnings_arguments(options: dict[str, Any], tmp_path: Path) -> None:
    seen = []
    for loggers, where in ((engine.loggers, "own"), (pytorch_lightning.loggers, "theirs")):
        logger = loggers.CSVLogger(where, **options)
        logger.log_metrics({"x": torch.tensor(1.5), "y": 0.1 + 0.2})
        logger.log_metrics({"y": 2})
        logger.log_metrics({"x": 3.0}, step=9)
        logger.log_hyperparams({"lr": 0.5})
        logger.finalize("success")
        rows = [{name: value for name, value in row.items() if value} for row in read(f"{logger.log_dir}/metrics.csv")]
        places = [str(Path(place)) for place in (logger.save_dir, logger.root_dir, logger.log_dir)]
        seen.append(
            ([p.replace(where, "") for p in places], logger.name, logger.version, rows, os.listdir(logger.log_dir))
        )
    assert seen[0][:4] == seen[1][:4] and set(seen[0][4]) == set(seen[1][4]) == {"metrics.csv", "hparams.yaml"}


def test_csv_rows_can_be_read_by_others_every_so_many_steps() -> None:
    logger = CSVLogger(".", "n", "v", flush_logs_every_n_steps=3)
    written = []
    for step in range(6):
        logger.experiment.log_metrics({"x": float(step)}, step)
        written.append(len(read("n/v/metrics.csv")))
    assert written == [0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_other_processes_than_the_first_write_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = kind("logs")
    logger.log_metrics({"x": 1.0}, 0)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_graph(Net())
    logger.experiment.add_image("picture", torch.zeros(3, 2, 2))
    logger.experiment[0].log_anything("at all")
    logger.save()
    assert logger.state_dict() == ({} if kind is TensorBoardLogger else {"rows": 0, "newest": {}})
    logger.finalize("success")
    assert logger.version == 0 and os.listdir() == []


class Drawn(Net):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.example_input_array = example


def graph_of(folder: str) -> Any:
    events = EventAccumulator(folder)
    events.Reload()
    return events.Graph() if events.Tags()["graph"] else None


@pytest.mark.parametrize("example", [torch.ones(2, 3), (torch.ones(2, 3),)])
def test_the_graph_of_a_model_is_drawn_and_the_run_is_the_same(example: Any) -> None:
    ends = []
    for draws in (False, True):
        engine.seed_everything(1)
        model = Drawn(example)
        fit(model, logger=TensorBoardLogger(".", f"n{draws}", "v", log_graph=draws))
        ends.append(weights(model))
    assert any("Linear[1]" in node.name for node in graph_of("nTrue/v").node) and graph_of("nFalse/v") is None
    assert ends[0].equal(ends[1]) and model.net[0].num_batches_tracked == 4


@pytest.mark.parametrize("example", [None, {"x": torch.ones(2, 3)}])
def test_a_graph_without_a_tensor_to_draw_it_with_is_left_out(example: Any) -> None:
    with pytest.warns(UserWarning, match="no graph is drawn, since example_input_array is a (NoneType|dict)"):
        fit(Drawn(example), logger=TensorBoardLogger(".", "n", "v", log_graph=True))


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
    names = {name.split(".")[0] for name in os.listdir("logs/n/version_0")}
    assert names == {"events", "metrics", "hparams"} and len(os.listdir("logs/n/version_0")) == 3


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
    assert sorted(name.split(".")[0] for name in os.listdir(run.log_dir)) == ["events", "hparams"]


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

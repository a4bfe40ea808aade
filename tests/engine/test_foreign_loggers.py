"""Loggers that are not the engine's: Lightning's own, and classes that users wrote by its documentation."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import engine
import pytest
import pytorch_lightning
from engine.callbacks import ModelCheckpoint
from engine.loggers import CSVLogger, DummyLogger, as_loggers, checkpoint_folder_of, run_folder_of
from toy import QUIET, Memory, Net, fit, loader, trainer

ENGINES = [pytest.param(engine, id="engine"), pytest.param(pytorch_lightning, id="lightning")]
both = pytest.mark.parametrize("pl", ENGINES)


def rows(path: str) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_lightnings_csv_logger_writes_what_ours_does() -> None:
    theirs, ours = pytorch_lightning.loggers.CSVLogger("logs", "theirs"), CSVLogger("logs", "ours")
    run = fit(Net(lr=0.3), None, loader(), logger=[theirs, ours], log_every_n_steps=2, max_epochs=2)
    assert rows("logs/theirs/version_0/metrics.csv") == rows("logs/ours/version_0/metrics.csv") != []
    files = [Path("logs", name, "version_0", "hparams.yaml").read_text() for name in ("theirs", "ours")]
    assert files[0] == files[1] == "lr: 0.3\n"
    assert run.log_dir == "logs/theirs/version_0" and run.logger is theirs


def test_lightnings_tensorboard_logger_writes_what_ours_does() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    theirs = pytorch_lightning.loggers.TensorBoardLogger("logs", "theirs")
    ours = engine.loggers.TensorBoardLogger("logs", "ours")
    fit(Net(lr=0.3), None, loader(), logger=[theirs, ours], log_every_n_steps=2, max_epochs=2)
    seen = []
    for name in ("theirs", "ours"):
        events = EventAccumulator(f"logs/{name}/version_0")
        events.Reload()
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        seen.append((found, events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content[:20]))
    assert seen[0] == seen[1] and {"train_loss", "val_loss", "hp_metric", "epoch"} == set(seen[0][0])


def documented(pl: ModuleType) -> type[Any]:
    """A logger as Lightning's documentation has one written."""
    if pl is engine:
        from engine.loggers.logger import Logger, rank_zero_experiment
        from engine.utilities import rank_zero_only
    else:
        from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
        from pytorch_lightning.utilities import rank_zero_only

    class MyLogger(Logger):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []
            self.saves = 0

        @property
        def name(self) -> str:
            return "MyLogger"

        @property
        @rank_zero_experiment
        def experiment(self) -> Any:
            return self.calls

        @property
        def version(self) -> str:
            return "0.1"

        @rank_zero_only
        def log_hyperparams(self, params: Any) -> None:
            self.calls.append(("hparams", dict(params)))

        @rank_zero_only
        def log_metrics(self, metrics: Any, step: Any) -> None:
            self.calls.append((step, dict(metrics)))

        @rank_zero_only
        def save(self) -> None:
            self.saves += 1

        @rank_zero_only
        def finalize(self, status: str) -> None:
            self.calls.append(status)

    return MyLogger


@both
def test_a_logger_as_documented_gets_the_same_calls(pl: ModuleType) -> None:
    class Steps(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Net().net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("n", float(batch_idx))
            return loss

        def configure_optimizers(self) -> Any:
            import torch

            return torch.optim.SGD(self.parameters(), self.hparams.lr)

    logger = documented(pl)()
    run = pl.Trainer(**{**QUIET, "logger": logger, "log_every_n_steps": 2, "default_root_dir": "root"})
    run.fit(Steps(), loader())
    assert logger.calls == [
        *(("hparams", {"lr": 0.1}), (1, {"n": 1.0, "epoch": 0}), (3, {"n": 3.0, "epoch": 0}), "success"),
    ]
    assert logger.saves and run.logger is logger and run.loggers == [logger]
    assert run.log_dir is None and logger.save_dir is None and logger.root_dir is None


@both
def test_other_processes_get_an_experiment_that_does_nothing(pl: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pytorch_lightning.utilities.rank_zero_only, "rank", 1)
    logger = documented(pl)()
    logger.log_metrics({"a": 1.0}, 0)
    logger.experiment.append(3)
    logger.experiment[0].add_image("x")
    assert logger.calls == []


class Tracker:
    """A tracking service's logger: no base class, a run of its own, and no folder for logs."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.status = ""
        self.files: list[str] = []
        self.run: str | None = None

    name, save_dir = "project", "tracked"

    @property
    def version(self) -> str | None:
        return self.run

    @property
    def experiment(self) -> Any:
        self.run = self.run or "run7"
        return self

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.values.append((step, metrics))

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.config.update(params)

    def save(self) -> None: ...

    def finalize(self, status: str) -> None:
        self.status = status

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.files.append(checkpoint_callback.best_model_path)


def test_an_object_with_the_methods_will_do() -> None:
    logger, saver = Tracker(), ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    run = fit(Net(), None, loader(), logger=logger, callbacks=saver, enable_checkpointing=True, max_epochs=2)
    assert logger.config == {"lr": 0.1} and logger.status == "success"
    assert [step for step, values in logger.values if "val_loss" in values] == [3, 7]
    assert run.log_dir == "tracked" and str(saver.dirpath).endswith("tracked/project/run7/checkpoints")
    assert len(logger.files) == 2 and all(Path(file).is_file() for file in logger.files)


def test_a_run_goes_on_with_loggers_that_have_no_state() -> None:
    first = Tracker()
    fit(Net(), logger=[first, CSVLogger(".", "n", "v")], log_every_n_steps=1).save_checkpoint("a.ckpt")
    again, second = Tracker(), Memory()
    run = trainer(logger=[again, CSVLogger(".", "n", "v"), second], log_every_n_steps=1, max_epochs=2)
    run.fit(Net(), loader(), ckpt_path="a.ckpt")
    assert [step for step, values in first.values + again.values if "train_loss" in values] == [*range(8)]
    assert [row["step"] for row in rows("n/v/metrics.csv")] == [*range(8)]


class Run:
    """What `wandb.init` returns."""

    def __init__(self, **options: Any) -> None:
        self.options, self.id, self.name = options, "id7", "happy-run"
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[tuple[Any, list[str]]] = []
        self.config = Config()
        self.watched: list[Any] = []

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def watch(self, model: Any, **options: Any) -> None:
        self.watched.append(model)


class Config(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class Artifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.metadata = name, metadata

    def add_file(self, path: str, name: str, policy: str) -> None:
        self.content = Path(path).read_bytes()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the service's package, so that Lightning's own logger for it runs."""
    packages = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
    vars(packages["wandb"]).update(init=Run, run=None, Artifact=Artifact)
    vars(packages["wandb.sdk.lib"]).update(RunDisabled=type("RunDisabled", (), {}))
    vars(packages["wandb.wandb_run"]).update(Run=Run)
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(pytorch_lightning.loggers.wandb, "_WANDB_AVAILABLE", True)
    return packages["wandb"]


@both
@pytest.mark.parametrize("log_model", ["all", True, False])
def test_lightnings_wandb_logger_gets_the_same_in_either_engine(pl: ModuleType, log_model: Any, wandb: Any) -> None:
    class Watched(Net if pl is engine else theirs()):  # type: ignore[misc]
        def on_fit_start(self) -> None:
            self.logger.watch(self)

    logger = pytorch_lightning.loggers.WandbLogger(project="p", save_dir="w", log_model=log_model)
    saver = pl.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=1, mode="max", save_last=True)
    options = {"logger": logger, "callbacks": saver, "max_epochs": 2, "log_every_n_steps": 2}
    run = pl.Trainer(**{**QUIET, **options, "enable_checkpointing": True})
    model = Watched(lr=0.3)
    run.fit(model, loader(), loader(4))
    experiment = logger.experiment
    assert experiment.config == {"lr": 0.3} and experiment.watched == [model]
    steps = [(values["trainer/global_step"], sorted(values)[0]) for values in experiment.logged]
    assert steps == [(1, "epoch"), (3, "epoch"), (3, "epoch"), (5, "epoch"), (7, "epoch"), (7, "epoch")]
    assert {name for values in experiment.logged for name in values} >= {"train_loss", "val_loss"}
    assert run.log_dir == "w" and Path(saver.dirpath).absolute() == Path("w/p/id7/checkpoints").absolute()
    assert bool(experiment.artifacts) == bool(log_model)
    for artifact, aliases in experiment.artifacts:
        assert artifact.name == "model-id7" and artifact.content and "latest" in aliases
        assert artifact.metadata["ModelCheckpoint"] | {"save_weights_only": False, "_every_n_train_steps": 0} == {
            **{"monitor": "val_loss", "mode": "max", "save_last": True, "save_top_k": 1},
            **{"save_weights_only": False, "_every_n_train_steps": 0},
        }
    if log_model:
        best = [artifact for artifact, aliases in experiment.artifacts if "best" in aliases]
        assert best and best[-1].metadata["score"] == pytest.approx(saver.best_model_score.item())


def theirs() -> type[Any]:
    """`Net` for Lightning."""
    members = {name: member for name, member in vars(Net).items() if name not in ("__dict__", "__weakref__")}

    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr, self.net, self.seen = lr, Net().net, []

    del members["__init__"]
    for name, member in members.items():
        if not name.startswith("__"):
            setattr(Theirs, name, member)
    return Theirs


LOGGERS: dict[str, Any] = {
    "none": lambda loggers: [],
    "default": lambda loggers: loggers.CSVLogger("logs"),
    "named": lambda loggers: loggers.CSVLogger("logs", "n", 5),
    "text": lambda loggers: loggers.TensorBoardLogger("logs", "n", "v"),
    "sub": lambda loggers: loggers.TensorBoardLogger("logs", "n", "v", sub_dir="s"),
    "two": lambda loggers: [loggers.CSVLogger("b", "n", "v"), loggers.TensorBoardLogger("a", "n", "v")],
    "service": lambda loggers: Tracker(),
    "nowhere": lambda loggers: documented(engine if loggers is engine.loggers else pytorch_lightning)(),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_folders_of_runs_and_checkpoints_are_lightnings(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    for pl in (engine, pytorch_lightning):
        (tmp_path / pl.__name__).mkdir()
        monkeypatch.chdir(tmp_path / pl.__name__)
        loggers = LOGGERS[kind](pl.loggers)
        if kind == "service":
            # Lightning begins the run of every logger.
            _ = loggers.experiment
        run = pl.Trainer(**{**QUIET, "logger": loggers or False, "default_root_dir": "root"})
        if pl is engine:
            given = loggers if isinstance(loggers, list) else [loggers]
            seen.append((run_folder_of(given, "root"), str(checkpoint_folder_of(given, "root").absolute())))
        else:
            saver = pl.callbacks.ModelCheckpoint()
            saver.setup(run, theirs()(), "fit")
            seen.append((run.log_dir, os.path.abspath(saver.dirpath).replace("pytorch_lightning", "engine")))
    assert seen[0] == seen[1]


def test_the_argument_of_the_trainer() -> None:
    one, two = Memory(), CSVLogger(".", "n", "v")
    assert as_loggers(None, ".") == as_loggers(False, ".") == as_loggers([], ".") == []
    assert as_loggers(one, ".") == [one] and as_loggers((one, two), ".") == [one, two]
    assert as_loggers(iter([one, two]), ".") == [one, two]
    (default,) = as_loggers(True, "root")
    assert isinstance(default, engine.loggers.TensorBoardLogger) and default.save_dir == "root"


def test_without_tensorboard_the_default_is_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.loggers.find_spec", lambda name: None)
    (default,) = as_loggers(True, "root")
    assert isinstance(default, CSVLogger) and default.save_dir == "root"


class Half:
    name = "half"

    def log_metrics(self, metrics: Any, step: int) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (Half(), "has no log_hyperparams, save, finalize, after_save_checkpoint, version, save_dir; give an object"),
        (CSVLogger, "CSVLogger.* is a class; give an object of a subclass of engine.loggers.Logger"),
        ("wandb", "logger='wandb' has no log_metrics, "),
        ([CSVLogger("."), 3], "logger=3 has no log_metrics"),
    ],
)
def test_what_is_no_logger_is_refused_with_what_it_lacks(wrong: Any, fault: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=fault):
        engine.Trainer(logger=wrong)


def test_an_unfinished_logger_cannot_be_made() -> None:
    class Unfinished(engine.loggers.Logger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    with pytest.raises(TypeError, match="abstract.*log_hyperparams.*name.*version"):
        Unfinished()


def test_a_dummy_logger_does_nothing_whatever_it_is_asked_to() -> None:
    logger = DummyLogger()
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_hyperparams({})
    logger.experiment.add_image("x", 3)
    logger[0].experiment[0].anything()
    logger.watch(Net())
    assert (logger.name, logger.version, logger.log_dir, os.listdir()) == ("", "", None, [])


@both
def test_code_that_uses_a_logger_runs_under_fast_dev_run(pl: ModuleType) -> None:
    class Draws(Net if pl is engine else theirs()):  # type: ignore[misc]
        def on_train_start(self) -> None:
            self.logger.experiment.add_image("picture", None)
            self.logger.watch(self)

    run = pl.Trainer(**{**QUIET, "logger": pl.loggers.CSVLogger("logs"), "fast_dev_run": True})
    run.fit(Draws(), loader(), loader(2))
    assert type(run.logger).__name__ == "DummyLogger" and not Path("logs").exists() and run.log_dir is None
    run = pl.Trainer(**{**QUIET, "logger": False, "fast_dev_run": True})
    assert run.logger is None and run.loggers == []


def test_the_older_name_of_the_base_still_works() -> None:
    assert engine.loggers.LightningLoggerBase is engine.loggers.Logger

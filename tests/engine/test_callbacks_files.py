"""ModelCheckpoint: the files that Lightning writes, whenever the trainer validates; names, links and what stays."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
import yaml
from engine.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from side_by_side import fitted, net, on_both
from toy import Net, Steps, fit, loader, trainer

SCORES = [3.0, 2.0, 2.5, 2.0, 2.0, 1.0, 1.5, 4.0, 0.5, 0.5, 3.0, 2.0, 0.1, 0.2, 0.3, 0.4]
HALF, THIRD = {"val_check_interval": 0.5}, {"val_check_interval": 3}
ACROSS: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": None}
SECOND, NONE = {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}
# Arguments of the ModelCheckpoint, and of the Trainer.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"save_top_k": -1}, validating) for validating in (HALF, THIRD, ACROSS, SECOND, NONE)),
    *(({"monitor": "score", "save_top_k": 2}, validating) for validating in ({}, HALF, ACROSS, SECOND)),
    *(({"every_n_train_steps": 3, "filename": "{step}-of-{epoch}"}, validating) for validating in ({}, HALF)),
    ({"monitor": "score", "save_top_k": 2, "mode": "max", "filename": "fixed"}, HALF),
    ({"monitor": "score", "save_top_k": -1, "every_n_epochs": 2}, THIRD),
    ({"monitor": "train_loss_step", "save_top_k": 3, "every_n_train_steps": 3}, HALF),
    ({"monitor": "score", "save_top_k": -1, "every_n_train_steps": 2}, HALF),
    ({"every_n_train_steps": 5, "save_top_k": -1, "filename": "same"}, {}),
    ({"save_on_train_epoch_end": True, "save_top_k": -1}, HALF),
    ({"save_on_train_epoch_end": False, "save_top_k": -1}, {}),
    ({"filename": "a-{score:.2f}-{epoch:03d}", "save_top_k": -1, "auto_insert_metric_name": False}, HALF),
    ({"filename": "{epoch}-{by/name:.1f}"}, {}),
    ({"filename": "same", "monitor": "score", "save_top_k": 3, "enable_version_counter": False}, {}),
    ({"every_n_epochs": 0}, {}),
    ({"train_time_interval": timedelta(0), "save_top_k": -1}, {}),
]


def files(folder: str = "c") -> dict[str, tuple[int, int]]:
    """Epoch and step in every file of a folder."""
    found = {
        str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in Path(folder).rglob("*.ckpt")
    }
    return {name: (saved["epoch"], saved["global_step"]) for name, saved in found.items()}


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize(("options", "validating"), CASES, ids=str)
def test_the_files_are_those_of_lightning(options: dict[str, Any], validating: dict[str, Any], tmp_path: Path) -> None:
    def program(pl: Any) -> Any:
        saver = pl.callbacks.ModelCheckpoint("c", **options)
        fitted(pl, net(pl)(scores=[*SCORES]), saver, max_epochs=3, enable_checkpointing=True, **validating)
        names = [saver.best_model_path, saver.kth_best_model_path, *saver.best_k_models]
        return files(), [Path(name).name for name in names], saver.best_model_score, saver.current_score

    ours, theirs = on_both(program, tmp_path)
    assert ours == theirs
    assert ours[0] or options == {"every_n_epochs": 0}


class Scores(Net):
    """Logs the scores that it is given as `score`, one for each validation."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.hparams.clear()
        self.scores = [*scores]

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.scores.pop(0))


def train(scores: list[float], saver: Any, **options: Any) -> engine.Trainer:
    run = trainer(callbacks=saver, enable_checkpointing=True, **{"max_epochs": len(scores), **options})
    run.fit(Scores(scores), loader(4), loader(2), ckpt_path=options.pop("ckpt_path", None))
    return run


def names(folder: str = "c") -> list[str]:
    return sorted(os.listdir(folder))


def test_last_can_be_a_link_to_the_newest_and_is_a_file_where_there_is_none() -> None:
    seen: list[tuple[str, int]] = []

    class Look(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            target = os.readlink("c/last.ckpt") if os.path.islink("c/last.ckpt") else "itself"
            seen.append((target, torch.load("c/last.ckpt", weights_only=True)["epoch"]))

    train([2, 3, 1], Look("c", "{epoch}", monitor="score", save_last="link"))
    assert seen == [("epoch=0.ckpt", 0), ("itself", 1), ("epoch=2.ckpt", 2)]
    assert names() == ["epoch=2.ckpt", "last.ckpt"]


def test_where_links_are_not_possible_last_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    train([2, 1], ModelCheckpoint("c", "{epoch}", monitor="score", save_last="link"))
    assert not os.path.islink("c/last.ckpt") and torch.load("c/last.ckpt", weights_only=True)["epoch"] == 1


def test_last_may_be_called_otherwise_and_is_one_file_all_the_same() -> None:
    saver = ModelCheckpoint("c", "best", monitor="score", save_last=True)
    saver.CHECKPOINT_NAME_LAST = "{epoch}-last"
    train([1, 2, 3], saver)
    assert names() == ["best.ckpt", "epoch=2-last.ckpt"]
    assert Path(saver.last_model_path).name == "epoch=2-last.ckpt"
    train([1], saver)
    again = ModelCheckpoint("c", "best", monitor="score", save_last=True)
    again.CHECKPOINT_NAME_LAST = "{epoch}-last"
    run = trainer(callbacks=again, enable_checkpointing=True, max_epochs=5)
    run.fit(Scores([2, 3, 4, 5]), loader(4), loader(2), ckpt_path="last")
    assert names() == ["best.ckpt", "epoch=4-last.ckpt"]


def test_files_that_were_there_stay_and_a_run_that_goes_on_replaces_its_own(tmp_path: Path) -> None:
    for _ in range(3):
        train([2, 1], ModelCheckpoint("c", "best", monitor="score", save_last=True))
    kept = ["best-v1.ckpt", "best-v2.ckpt", "best.ckpt", "last-v1.ckpt", "last-v2.ckpt", "last.ckpt"]
    assert names() == kept
    saver = ModelCheckpoint("c", "best", monitor="score", save_last=True)
    run = trainer(callbacks=saver, enable_checkpointing=True, max_epochs=3)
    run.fit(Scores([0]), loader(4), loader(2), ckpt_path="c/last-v2.ckpt")
    assert names() == kept
    assert {name: epoch for name, (epoch, _) in files().items() if epoch == 2} == {"best-v2.ckpt": 2, "last-v2.ckpt": 2}


def test_what_a_killed_run_wrote_after_its_checkpoint_is_replaced() -> None:
    saver = ModelCheckpoint("c", "{epoch}", save_last=True)
    train([3, 2, 1], saver)
    os.rename("c/last.ckpt", "kept.ckpt")
    train([3, 2, 1], ModelCheckpoint("d", "{epoch}", save_top_k=-1))
    # As if killed after epoch 1: the files of epochs 1 and 2 are there, and the checkpoint of epoch 0 is what is left.
    again = ModelCheckpoint("d", "{epoch}", save_top_k=-1)
    again.others = set()
    run = trainer(callbacks=again, enable_checkpointing=True, max_epochs=3)
    run.fit(Scores([2, 1]), loader(4), loader(2), ckpt_path="d/epoch=0.ckpt")
    assert names("d") == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]


def test_the_file_that_a_run_was_told_to_go_on_from_stays() -> None:
    train([3, 2], ModelCheckpoint("c", "{epoch}", monitor="score"))
    saver = ModelCheckpoint("c", "{epoch}", monitor="score")
    run = trainer(callbacks=saver, enable_checkpointing=True, max_epochs=4)
    run.fit(Scores([1, 0]), loader(4), loader(2), ckpt_path="c/epoch=1.ckpt")
    assert names() == ["epoch=1.ckpt", "epoch=3.ckpt"] and list(saver.best_k_models) == [saver.best_model_path]


def test_two_callbacks_in_one_folder_do_not_take_each_others_files() -> None:
    low, high = (ModelCheckpoint("c", "{epoch}", monitor="score", mode=mode) for mode in ("min", "max"))
    train([1, 2, 0], [low, high])
    assert torch.load(low.best_model_path, weights_only=True)["epoch"] == 2
    assert torch.load(high.best_model_path, weights_only=True)["epoch"] == 1
    assert len(names()) == 2


def test_the_last_of_an_earlier_run_is_found_and_a_first_run_starts_afresh() -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint("c", save_last=True)

    first = trainer(callbacks=saver(), enable_checkpointing=True, max_epochs=1)
    with pytest.warns(UserWarning, match="there is no last checkpoint yet; the run starts afresh"):
        first.fit(Net(), loader(4), ckpt_path="last")
    second = trainer(callbacks=saver(), enable_checkpointing=True, max_epochs=3)
    second.fit(Net(), loader(4), ckpt_path="last")
    assert (first.global_step, second.global_step) == (2, 6)
    with pytest.raises(engine.MisconfigurationException, match="ckpt_path='last', but no ModelCheckpoint"):
        trainer().validate(Net(), loader(4), ckpt_path="last")


def test_weights_alone_can_be_tested_and_not_resumed() -> None:
    saver = ModelCheckpoint("c", save_last=True, save_weights_only=True)
    train([1.0], saver)
    assert "optimizer_states" not in torch.load("c/last.ckpt", weights_only=True)
    trainer().validate(Net(), loader(2), ckpt_path=saver.best_model_path, verbose=False)
    with pytest.raises(engine.MisconfigurationException, match="holds weights only"):
        trainer().fit(Net(), loader(4), ckpt_path=saver.best_model_path)


def test_without_anything_to_save_the_end_is_the_last() -> None:
    train([1.0, 2.0], ModelCheckpoint("c", every_n_epochs=0, save_last=True))
    assert files() == {"last.ckpt": (2, 4)}


def test_epochs_that_end_without_validation_are_the_last_all_the_same() -> None:
    train(
        [1.0] * 4, ModelCheckpoint("c", "{epoch}", monitor="score", save_last=True), val_check_interval=1, max_epochs=2
    )
    assert files()["last.ckpt"] == (1, 4)
    train([1.0], ModelCheckpoint("d", "{epoch}", save_last=True), check_val_every_n_epoch=2, max_epochs=3)
    assert files("d") == {"epoch=1.ckpt": (1, 4), "last.ckpt": (2, 6)}


def test_everything_that_is_decided_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    train([1, 2], ModelCheckpoint("c", "best", monitor="score", verbose=True))
    train([1], ModelCheckpoint("d", "best", verbose=True))
    out = capsys.readouterr().out
    assert f"ModelCheckpoint: after 2 steps, score=1.0: saved {Path('c/best.ckpt').resolve()}" in out
    assert "ModelCheckpoint: after 4 steps, score=2.0: not among the best 1" in out
    assert f"ModelCheckpoint: after 2 steps, saved {Path('d/best.ckpt').resolve()}" in out


def test_loggers_hear_of_every_file() -> None:
    class Listens(engine.loggers.CSVLogger):
        heard: list[str] = []

        def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
            self.heard.append(Path(checkpoint_callback.best_model_path).name)

    train([2, 1, 3], ModelCheckpoint("c", "{epoch}", monitor="score", save_last=True), logger=Listens("logs"))
    assert Listens.heard == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=1.ckpt"]


def test_the_best_are_listed_in_yaml() -> None:
    saver = ModelCheckpoint("c", "{epoch}", monitor="score", save_top_k=2)
    train([3, 1, 2], saver)
    saver.to_yaml()
    expected = {str(Path(f"c/epoch={n}.ckpt").resolve()): float(n) for n in (1, 2)}
    assert yaml.safe_load(Path("c/best_k_models.yaml").read_text()) == expected


@pytest.mark.parametrize(
    ("filename", "metrics", "options", "expected"),
    [
        ("{epoch}", {"epoch": 0}, {}, "epoch=0.ckpt"),
        ("{epoch:03d}", {"epoch": 5}, {}, "epoch=005.ckpt"),
        ("{epoch}-{val_loss:.2f}", {"epoch": 2, "val_loss": torch.tensor(0.123456)}, {}, "epoch=2-val_loss=0.12.ckpt"),
        ("{epoch}", {"epoch": 2}, {"ver": 3}, "epoch=2-v3.ckpt"),
        ("{missing:d}", {}, {}, "missing=0.ckpt"),
        (None, {"epoch": 1, "step": 2}, {}, "epoch=1-step=2.ckpt"),
        (None, {"step": 2}, {"filename": "x-{step}"}, "x-step=2.ckpt"),
    ],
)
def test_names_are_formatted_as_by_lightning(
    filename: str | None, metrics: dict[str, Any], options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    def program(pl: Any) -> str:
        saver = pl.callbacks.ModelCheckpoint("c", filename)
        return os.path.relpath(saver.format_checkpoint_name(dict(metrics), **options))

    assert on_both(program, tmp_path) == (f"c/{expected}", f"c/{expected}")


@pytest.mark.parametrize("own", [False, True])
def test_a_run_that_fails_is_saved_and_can_go_on(own: bool) -> None:
    saver: Any = OnExceptionCheckpoint("c", "failed") if own else ModelCheckpoint("c", save_on_exception=True)

    def fail(model: Net, batch: Any, batch_idx: int) -> Any:
        if model.global_step == 3 and model.seen.count(("train", 3)) == 1:
            raise ValueError("broken sample")
        return model.loss(batch)

    with pytest.raises(ValueError, match="broken sample"):
        fit(Steps(fail), callbacks=saver, enable_checkpointing=True)
    [name] = names()
    assert name == ("failed.ckpt" if own else "epoch=0-step=3.ckpt")
    run, again = trainer(max_epochs=1), Steps()
    run.fit(again, loader(), ckpt_path=f"c/{name}")
    assert again.seen == [("train", 3)] and run.global_step == 4


def test_a_run_that_ends_well_needs_no_file_of_its_failure() -> None:
    saver = OnExceptionCheckpoint("c")
    Path("c").mkdir()
    Path(saver.ckpt_path).touch()
    fit(Net(), callbacks=saver, enable_checkpointing=True)
    assert names() == []
    with pytest.raises(engine.MisconfigurationException, match="filename=''"):
        OnExceptionCheckpoint("c", "")


def test_before_the_first_step_a_failure_leaves_no_file() -> None:
    def fail(model: Net, batch: Any, batch_idx: int) -> Any:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        fit(Steps(fail), callbacks=ModelCheckpoint("c", save_on_exception=True), enable_checkpointing=True)
    assert names() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_last": "yes"}, "save_last='yes'; give True, False or 'link'"),
        ({"train_time_interval": 5}, "train_time_interval=5; give a datetime.timedelta"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1; give a whole number from 0"),
        (
            {"every_n_train_steps": 2, "every_n_epochs": 1},
            "every_n_train_steps, every_n_epochs, train_time_interval: give one of them",
        ),
        (
            {"every_n_epochs": 2, "train_time_interval": timedelta(1)},
            "every_n_train_steps, every_n_epochs, train_time_interval: give one of them",
        ),
        ({"filename": "last"}, "filename='last' is the name of another file"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=message):
        ModelCheckpoint(**options)

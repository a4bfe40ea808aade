"""ModelCheckpoint: which files there are, when, and under which names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from toy import Net, loader, trainer

NAN = float("nan")


class Scores(Net):
    """Logs the given value as `score` in the validation of each epoch; None logs nothing."""

    def __init__(self, scores: list[float | None]) -> None:
        super().__init__()
        self.hparams.clear()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        score = self.scores[self.current_epoch]
        if score is not None:
            self.log("score", score)
            self.log("val/loss", score)


def train(scores: list[float | None], saver: ModelCheckpoint, **options: Any) -> engine.Trainer:
    run = trainer(callbacks=saver, enable_checkpointing=True, **{"max_epochs": len(scores), **options})
    run.fit(Scores(scores), loader(4), loader(2))
    return run


def kept(folder: str | Path = "c") -> list[int]:
    """Epochs of the files `epoch=N.ckpt`."""
    names = [path.stem for path in Path(folder).glob("*.ckpt") if path.stem != "last"]
    return sorted(int(name.removeprefix("epoch=")) for name in names)


@pytest.mark.parametrize(
    ("scores", "mode", "top_k", "expected", "best"),
    [
        ([3, 1, 2], "min", 1, [1], 1),
        ([3, 1, 2], "max", 1, [0], 0),
        ([3, 1, 2, 0], "min", 2, [1, 3], 3),
        ([3, 1, 2, 0], "max", 2, [0, 2], 0),
        ([1, 2, 3], "min", -1, [0, 1, 2], 0),
        ([3, 1, 2], "min", 9, [0, 1, 2], 1),
        ([3, 1, 2], "min", 0, [], None),
        ([1, 1, 1], "min", 1, [0], 0),
        ([1, 1, 1], "max", 1, [0], 0),
        ([2, 1, 1, 2], "min", 2, [1, 2], 1),
        ([NAN, 2, NAN, 1], "min", 1, [3], 3),
        ([2, NAN], "min", 1, [0], 0),
        ([float("inf"), 1], "min", 1, [1], 1),
    ],
)
def test_the_best_are_kept_and_of_equals_the_older(
    scores: list[float], mode: Any, top_k: int, expected: list[int], best: int | None
) -> None:
    saver = ModelCheckpoint("c", "{epoch}", monitor="score", mode=mode, save_top_k=top_k)
    train([*scores], saver)
    assert kept() == expected
    assert Path(saver.best_model_path).name == ("" if best is None else f"epoch={best}.ckpt")
    if best is not None:
        assert saver.best_model_score == scores[best]
        assert torch.load(saver.best_model_path, weights_only=True)["epoch"] == best


def test_without_a_value_to_monitor_the_newest_is_kept() -> None:
    saver = ModelCheckpoint("c", "{epoch}")
    train([1, 2, 3], saver)
    assert kept() == [2] and saver.best_model_path == str(Path("c/epoch=2.ckpt").resolve())
    train([1, 2, 3], ModelCheckpoint("all", "{epoch}", save_top_k=-1))
    assert kept("all") == [0, 1, 2]


def test_last_is_the_newest_even_if_it_is_not_among_the_best() -> None:
    saver = ModelCheckpoint("c", "{epoch}", monitor="score", save_last=True)
    train([1, 2, 3], saver)
    assert kept() == [0]
    assert torch.load("c/last.ckpt", weights_only=True)["epoch"] == 2
    assert saver.last_model_path == str(Path("c/last.ckpt").resolve())


def test_last_shares_the_bytes_of_the_best_and_moves_on_without_it() -> None:
    seen = []

    class Look(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            seen.append(os.path.samefile("c/best.ckpt", "c/last.ckpt"))

    train([1, 2], Look("c", "best", monitor="score", save_last=True))
    assert seen == [True, False]
    assert torch.load("c/best.ckpt", weights_only=True)["epoch"] == 0
    assert torch.load("c/last.ckpt", weights_only=True)["epoch"] == 1
    assert sorted(os.listdir("c")) == ["best.ckpt", "last.ckpt"]


def test_without_hard_links_last_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    train([2, 1], ModelCheckpoint("c", "best", monitor="score", save_last=True))
    assert torch.load("c/last.ckpt", weights_only=True)["epoch"] == 1
    assert Path("c/last.ckpt").read_bytes() == Path("c/best.ckpt").read_bytes()


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (9, [])])
def test_every_n_epochs(every: int, expected: list[int]) -> None:
    train([1] * 4, ModelCheckpoint("c", "{epoch}", save_top_k=-1, every_n_epochs=every))
    assert kept() == expected


def test_epochs_without_validation_save_only_last() -> None:
    saver = ModelCheckpoint("c", "{epoch}", monitor="score", save_top_k=-1, save_last=True)
    train([5, 4, 3, 2, 1], saver, check_val_every_n_epoch=2)
    assert kept() == [1, 3]
    assert torch.load("c/last.ckpt", weights_only=True)["epoch"] == 4


@pytest.mark.parametrize(
    ("filename", "auto", "expected"),
    [
        ("{epoch}-{step}", True, "epoch=0-step=2.ckpt"),
        ("{epoch:03d}", True, "epoch=000.ckpt"),
        ("net-{score:.2f}", True, "net-score=0.25.ckpt"),
        ("net-{score:.2f}", False, "net-0.25.ckpt"),
        ("e{epoch:02d}s{step}", False, "e00s2.ckpt"),
        ("{val/loss:.1f}", False, "0.2.ckpt"),
        ("plain", True, "plain.ckpt"),
    ],
)
def test_names_are_filled_with_values(filename: str, auto: bool, expected: str) -> None:
    train([0.25], ModelCheckpoint("c", filename, auto_insert_metric_name=auto))
    assert os.listdir("c") == [expected]


def test_a_name_with_a_value_that_was_not_logged_is_refused() -> None:
    with pytest.raises(engine.MisconfigurationException, match="no val_los was logged, only epoch, .*score"):
        train([0.25], ModelCheckpoint("c", "{val_los:.2f}"))


@pytest.mark.parametrize("scores", [[3, 1, 2], [1, 2, 3], [0.11, 0.12, 0.13]])
@pytest.mark.parametrize("filename", ["fixed", "{score:.1f}"])
def test_several_best_under_one_name_lose_none(scores: list[float], filename: str) -> None:
    saver = ModelCheckpoint("c", filename, monitor="score", save_top_k=2)
    train([*scores], saver)
    best = sorted(scores)[:2]
    assert sorted(saver.best_k_models.values()) == pytest.approx(best)
    epochs = [torch.load(path, weights_only=True)["epoch"] for path in saver.best_k_models]
    assert sorted(epochs) == sorted(scores.index(score) for score in best)
    assert len(os.listdir("c")) == 2


def test_a_static_name_is_replaced_by_each_better_one() -> None:
    saver = ModelCheckpoint("c", "best", monitor="score")
    train([3, 2, 5, 1], saver)
    assert os.listdir("c") == ["best.ckpt"]
    assert torch.load("c/best.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("broken", ["torch.save", "os.replace"])
def test_a_failed_save_keeps_the_old_file_and_the_paths_to_it(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with monkeypatch.context() as patched:
                if trainer.current_epoch == 1:
                    patched.setattr(broken, fails)
                super().on_train_epoch_end(trainer, pl_module)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = Breaks("c", "{epoch}", monitor="score", save_last=True)
    with pytest.raises(OSError, match="No space left"):
        train([2, 1], saver)
    assert sorted(os.listdir("c")) == ["epoch=0.ckpt", "last.ckpt"]
    assert Path(saver.best_model_path).name == "epoch=0.ckpt" and saver.best_model_score == 2
    assert [Path(path).name for path in saver.best_k_models] == ["epoch=0.ckpt"]


def test_the_old_file_goes_only_after_the_new_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    unlink, replace = Path.unlink, os.replace

    def noting_unlink(self: Path, *args: Any, **kwargs: Any) -> None:
        events.append(f"remove {self.name}")
        unlink(self, *args, **kwargs)

    def noting_replace(source: Any, target: Any) -> None:
        events.append(f"write {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(Path, "unlink", noting_unlink)
    monkeypatch.setattr(os, "replace", noting_replace)
    train([2, 1], ModelCheckpoint("c", "{epoch}", monitor="score"))
    events = [event for event in events if not event.endswith(".tmp")]
    # While training goes on, there is always a second complete file; a name is removed when its file has another one.
    expected = ["write epoch=0.ckpt", "write previous.ckpt", "write epoch=1.ckpt", "remove epoch=0.ckpt"]
    assert events == [*expected, "remove previous.ckpt"]


@pytest.mark.parametrize(
    "make", [lambda n: ModelCheckpoint("c", monitor=n), lambda n: engine.callbacks.EarlyStopping(n)]
)
def test_a_name_that_never_appears_ends_the_run_after_the_first_epoch(make: Any) -> None:
    run, model = trainer(callbacks=make("val_los"), enable_checkpointing=True, max_epochs=5), Scores([1.0] * 5)
    with pytest.raises(engine.MisconfigurationException) as caught:
        run.fit(model, loader(4), loader(2))
    message = str(caught.value)
    assert "watches 'val_los', which was never logged; logged are: score, train_loss, val/loss" in message
    assert model.count("train") == 2


def test_the_state_in_a_file_knows_of_the_file_itself() -> None:
    train([3, 1, 2], ModelCheckpoint("c", "{epoch}", monitor="score", save_top_k=2))
    [state] = torch.load("c/epoch=2.ckpt", weights_only=True)["callbacks"].values()
    assert state["best_k_models"] == {"epoch=1.ckpt": 1.0, "epoch=2.ckpt": 2.0}
    assert (state["best_model_path"], state["best_model_score"]) == ("epoch=1.ckpt", 1.0)


def test_a_resumed_run_goes_on_from_the_best_so_far() -> None:
    train([1, 3, 2], ModelCheckpoint("c", "{epoch}", monitor="score", save_last=True), max_epochs=2)
    saver = ModelCheckpoint("c", "{epoch}", monitor="score", save_last=True)
    run = trainer(callbacks=saver, enable_checkpointing=True, max_epochs=4)
    run.fit(Scores([9, 9, 2, 0.5]), loader(4), loader(2), ckpt_path="c/last.ckpt")
    assert kept() == [3] and saver.best_model_score == 0.5


def test_the_folder_defaults_to_checkpoints_in_that_of_the_logger() -> None:
    run = trainer(logger=engine.loggers.CSVLogger("logs", "n", "v"), enable_checkpointing=True)
    run.fit(Net(), loader(4))
    assert run.checkpoint_callback is not None
    assert Path(run.checkpoint_callback.best_model_path) == Path("logs/n/v/checkpoints/epoch=0-step=2.ckpt")
    other = trainer(enable_checkpointing=True, default_root_dir="root")
    other.fit(Net(), loader(4))
    assert os.listdir("root/checkpoints") == ["epoch=0-step=2.ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode='best'; give 'min'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "save_top_k=2, monitor=None"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=message):
        ModelCheckpoint(**options)

"""Faults of disks, injected for real: never is a damaged checkpoint used, never a good one lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import checkpoint
from engine.callbacks import ModelCheckpoint
from engine.loggers import CSVLogger, TensorBoardLogger
from injection import Apart, Space, at, notes, ordinary_user, space, time_limit
from torch import Tensor, nn
from toy import Net, loader, trainer, weights

EPOCHS, STEPS = 4, 4


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    with time_limit():
        yield


class Wide(Net):
    """Some 80 kB of weights: larger than anything else that a run writes."""

    def __init__(self) -> None:
        super().__init__(lr=0.001)
        self.net = nn.Sequential(nn.Linear(3, 4000), nn.ReLU(), nn.Linear(4000, 1))


def make(*acts: engine.Callback, folder: str = "c", **options: Any) -> tuple[engine.Trainer, ModelCheckpoint]:
    engine.seed_everything(3)
    saver = ModelCheckpoint(folder, filename="best", monitor="train_loss_epoch", save_last=True)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, **options}
    return trainer(callbacks=[*acts, saver], **options), saver


class Logging(Wide):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss


def train(run: engine.Trainer, ckpt_path: str | None = None) -> Tensor:
    """The weights at the end."""
    engine.seed_everything(3 if ckpt_path is None else 99)
    model = Logging()
    run.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return weights(model)


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The weights of a run that nothing happens to."""
    return train(make(folder=str(tmp_path_factory.mktemp("whole")))[0])


def fault(action: Callable[[], Any], *kinds: type[BaseException]) -> BaseException:
    with pytest.raises(kinds or (OSError, RuntimeError)) as caught:
        action()
    return caught.value


def good_files(folder: str = "c") -> dict[str, int]:
    """Optimizer steps of every checkpoint of a folder, all of which must be whole; nothing half-written remains."""
    assert not [*Path(folder).glob("*.tmp*")]
    return {file.name: checkpoint.load(file)["global_step"] for file in Path(folder).glob("*.ckpt")}


def settle(trainer: engine.Trainer) -> None:
    """Wait for the thread that writes, without looking at its errors."""
    if trainer.writer._thread is not None:
        trainer.writer._thread.join()


# Disk full


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_ends_the_run_keeps_what_was_saved_and_the_run_goes_on_once_there_is_space(
    kind: str, asynchronous: bool, tmp_path: Path, end: Tensor
) -> None:
    with space(kind, tmp_path) as disk:
        fills = at("on_train_epoch_start", 3, lambda run: (settle(run), disk.fill()))
        run, saver = make(fills, at("on_train_batch_start", 13, settle), async_save=asynchronous)
        error = fault(lambda: train(run))
        assert "could not be written; those written before it stand" in notes(error)
        assert any(word in str(error) for word in ("No space left", "File too large")), "the reason is missing"
        # In the background, the error comes with the next step.
        assert run.global_step == 3 * STEPS + asynchronous
        assert max(good_files().values()) == 2 * STEPS
        for path in (saver.best_model_path, saver.last_model_path):
            assert checkpoint.load(Path(path))["global_step"] == 2 * STEPS
        disk.free()
        assert train(make()[0], "auto").equal(end)


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_disk_that_is_full_from_the_start_leaves_nothing_half_written(kind: str, tmp_path: Path) -> None:
    with space(kind, tmp_path) as disk:
        disk.fill()
        error = fault(lambda: train(make()[0]))
        assert "could not be written" in notes(error)
        assert good_files() == {}


def test_a_disk_without_hard_links_that_fills_up_between_best_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    # Room for one file and a half.
    with space("disk", tmp_path, size="160k"):
        error = fault(lambda: train(make()[0]))
        assert notes(error), "nothing says what that means for the run"
        assert good_files() == {"best.ckpt": STEPS}
        assert train(make(max_epochs=1)[0], "auto").equal(train(make(folder=str(tmp_path / "whole"), max_epochs=1)[0]))


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("every", [1, 1000])
def test_logs_that_do_not_fit_any_more_end_the_run_with_a_note(
    make_logger: type[engine.loggers.Logger], every: int, tmp_path: Path
) -> None:
    with space("limit", tmp_path, limit=300) as disk:
        logger = make_logger(".", "run", "v")
        run = trainer(
            logger=logger, max_epochs=40, log_every_n_steps=every, callbacks=at("on_fit_start", 1, fill(disk))
        )
        error = fault(lambda: train(run))
        assert "the logs in run/v cannot be written; free space" in notes(error)


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
def test_logs_on_a_full_disk_and_then_on_one_with_space(
    make_logger: type[engine.loggers.Logger], tmp_path: Path, end: Tensor
) -> None:
    with space("disk", tmp_path) as disk:
        fills = at("on_train_epoch_start", 3, fill(disk))
        run, _ = make(fills, logger=make_logger(".", "run", "v"), log_every_n_steps=1)
        error = fault(lambda: train(run))
        assert notes(error)
        assert max(good_files().values()) == 2 * STEPS
        disk.free()
        again, _ = make(logger=make_logger(".", "run", "v"), log_every_n_steps=1)
        assert train(again, "auto").equal(end)
        if make_logger is CSVLogger:
            rows = Path("run/v/metrics.csv").read_text().splitlines()
            assert sorted(int(row.split(",")[0]) for row in rows[1:]) == sorted([*range(16), 3, 7, 11, 15])


def fill(disk: Space) -> Callable[[engine.Trainer], None]:
    return lambda run: disk.fill()


# A folder that vanishes, rights that are lost, a path that cannot be


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_a_checkpoint_folder_that_vanishes_ends_the_run(asynchronous: bool, end: Tensor) -> None:
    gone = at("on_train_epoch_start", 3, lambda run: (settle(run), shutil.rmtree("c")))
    run, saver = make(gone, at("on_train_batch_start", 13, settle), async_save=asynchronous)
    error = fault(lambda: train(run), FileNotFoundError)
    assert "the checkpoint c/best.ckpt could not be written" in notes(error) or "c/last.ckpt" in notes(error)
    assert run.global_step == 3 * STEPS + asynchronous
    assert not train(make()[0], "auto").equal(end), "there was nothing to go on from, and the seed is another one"


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
def test_a_run_folder_that_vanishes_ends_the_run(make_logger: type[engine.loggers.Logger]) -> None:
    gone = at("on_train_epoch_start", 3, lambda run: shutil.rmtree("run"))
    run, _ = make(gone, folder="run/v/checkpoints", logger=make_logger(".", "run", "v"), log_every_n_steps=1)
    error = fault(lambda: train(run), FileNotFoundError)
    assert "cannot be written" in notes(error) or "could not be written" in notes(error)
    assert 2 * STEPS < run.global_step <= 3 * STEPS


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_permission_lost_ends_the_run_and_given_back_it_goes_on(asynchronous: bool, end: Tensor) -> None:
    taken = at("on_train_epoch_start", 3, lambda run: (settle(run), Path("c").chmod(0o500)))
    run, saver = make(taken, at("on_train_batch_start", 13, settle), async_save=asynchronous)
    with ordinary_user():
        error = fault(lambda: train(run), PermissionError)
        assert "those written before it stand" in notes(error)
        assert set(good_files().values()) == {STEPS, 2 * STEPS} or set(good_files().values()) == {2 * STEPS}
        # A folder that cannot be written can still be resumed from, up to the next checkpoint.
        assert notes(fault(lambda: train(make()[0], "auto"), PermissionError))
        Path("c").chmod(0o700)
        assert train(make()[0], "auto").equal(end)


@pytest.mark.parametrize("path", ["file", "file/c", "file/c/d"])
def test_a_checkpoint_folder_beneath_a_file_is_told_of(path: str) -> None:
    Path("file").write_text("text")
    error = fault(lambda: train(make(folder=path)[0]), OSError, engine.MisconfigurationException)
    assert isinstance(error, engine.MisconfigurationException) or notes(error), repr(error)
    assert path in f"{error} {notes(error)}" and Path("file").read_text() == "text"


def test_a_log_folder_beneath_a_file_is_refused() -> None:
    Path("file").write_text("text")
    for logger in (CSVLogger, TensorBoardLogger):
        with pytest.raises(engine.MisconfigurationException, match="the folder file.* cannot be made"):
            trainer(logger=logger("file", "a")).fit(Net(), loader())


def test_a_log_folder_without_permission_is_refused() -> None:
    Path("logs/a").mkdir(parents=True)
    Path("logs/a").chmod(0o500)
    with ordinary_user(), pytest.raises(engine.MisconfigurationException, match="the folder logs/a.* cannot be made"):
        trainer(logger=CSVLogger("logs", "a")).fit(Net(), loader())


# In the background


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes a third of a second, as on a network disk."""
    real = os.fsync

    def fsync(number: int) -> None:
        time.sleep(0.15)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("slow_disk")
def test_a_file_written_in_the_background_holds_the_step_at_which_it_was_saved() -> None:
    saved: dict[int, Tensor] = {}
    went_on: list[bool] = []

    class Watch(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            saved[trainer.global_step] = weights(pl_module)
            super().on_train_epoch_end(trainer, pl_module)

    def look(run: engine.Trainer) -> None:
        assert run.writer._thread is not None
        went_on.append(run.writer._thread.is_alive() and not Path("c/epoch=1.ckpt").exists())

    saver = Watch("c", filename="{epoch}", save_top_k=-1, monitor="train_loss_epoch", save_last=True)
    callbacks = [saver, at("on_train_batch_end", 6, look)]
    train(trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3, async_save=True))
    assert went_on == [True], "training waited for the disk"
    for epoch in range(3):
        loaded = checkpoint.load(Path(f"c/epoch={epoch}.ckpt"))
        step = loaded["global_step"]
        assert torch.cat([value.double().flatten() for value in loaded["state_dict"].values()]).equal(saved[step])
    assert good_files()["last.ckpt"] == 3 * STEPS


@pytest.mark.usefixtures("slow_disk")
def test_paths_change_and_old_files_go_only_once_the_new_file_is_on_the_disk() -> None:
    seen: list[tuple[str, str, list[str]]] = []

    def look(run: engine.Trainer) -> None:
        paths = [os.path.relpath(path) if path else "" for path in (saver.best_model_path, saver.last_model_path)]
        seen.append((paths[0], paths[1], sorted(good_now())))

    def good_now() -> list[str]:
        return [file.name for file in Path("c").glob("*.ckpt") if checkpoint.load(file)]

    saver = ModelCheckpoint("c", filename="{epoch}", save_last=True)
    looks = [at("on_train_batch_end", 5, look), SecondLook(look)]
    train(trainer(callbacks=[*looks, saver], enable_checkpointing=True, max_epochs=3, async_save=True))
    assert seen[0] == ("", "", [])
    best, last, files = seen[1]
    assert (best, last) == ("c/epoch=0.ckpt", "c/last.ckpt") and {"epoch=0.ckpt", "last.ckpt"} <= {*files}
    assert os.path.relpath(saver.best_model_path) == "c/epoch=2.ckpt"
    assert good_files() == {"epoch=2.ckpt": 12, "last.ckpt": 12}


class SecondLook(engine.Callback):
    """Looks in the third epoch's first batch."""

    def __init__(self, look: Callable[[engine.Trainer], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
        if trainer.global_step == 9:
            self.look(trainer)


def test_an_error_in_the_background_ends_the_run_at_the_end_of_fit_at_the_latest(tmp_path: Path) -> None:
    with space("limit", tmp_path) as disk:
        run, saver = make(at("on_train_epoch_end", 1, fill(disk)), max_epochs=1, async_save=True)
        error = fault(lambda: train(run))
        assert "could not be written" in notes(error) and run.global_step == STEPS
        assert (saver.best_model_path, saver.last_model_path) == ("", "")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize(
    ("name", "after"),
    [("fsync", "last.ckpt"), ("replace", "last.ckpt"), ("replace", "previous.ckpt")],
    ids=["writing", "keeping", "renaming"],
)
def test_a_process_killed_while_it_writes_leaves_the_former_file(
    asynchronous: bool, name: str, after: str, end: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, name)

    def stuck(*args: Any) -> None:
        # The second epoch's file, or its new name.
        if Path("c", after).exists() and Path("c/best.ckpt.tmp").exists():
            print("stuck", flush=True)
            time.sleep(50)
        real(*args)

    def work() -> None:
        monkeypatch.setattr(os, name, stuck)
        train(make(async_save=asynchronous)[0])

    child = Apart(work)
    child.wait_for("stuck")
    child.send(signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    assert [*Path("c").glob("*.tmp")]
    assert checkpoint.load(Path("c/last.ckpt"))["global_step"] == STEPS
    assert train(make()[0], "auto").equal(end)
    assert good_files().keys() == {"best.ckpt", "last.ckpt"}

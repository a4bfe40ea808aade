"""`--ckpt_path auto`: a command that can stand in a job script for ever."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

RUN = ("--max_epochs", "3", "--limit_train_batches", "4", "--log_every_n_steps", "1", "--model.width", "4")
AUTO = (*RUN, "--ckpt_path", "auto")
FOLDER = Path("logs/standard_net/version_0")
LAST = FOLDER / "checkpoints/last.ckpt"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int = 0) -> Iterator[None]:
    """Runs end in this batch, with nothing saved."""
    import engine
    import main

    class Dies(engine.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, data: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (epoch, batch):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = main.callbacks
        patch.setattr(main, "callbacks", lambda *a: [*original(*a), Dies()])
        yield


def end_of(run: Callable, *words: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights and metrics at the end of an uninterrupted run in a folder of its own."""
    assert run(*RUN, *words, "--log_dir", "whole").code == 0
    folder = Path("whole", *FOLDER.parts[1:])
    return weights(folder / "checkpoints/last.ckpt"), (folder / "metrics.csv").read_text()


def test_an_unfinished_run_goes_on_and_a_finished_one_exits_at_once(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, log = end_of(run)
    with dying(monkeypatch, epoch=2, batch=1):
        assert run(*AUTO).code == 130
    goes_on = run(*AUTO)
    assert goes_on.code == 0 and f"going on with {FOLDER}" in goes_on.out and goes_on.out.count("epoch ") == 1
    assert os.listdir(FOLDER.parent) == ["version_0"]
    assert all(torch.equal(value, final[name]) for name, value in weights(LAST).items())
    assert (FOLDER / "metrics.csv").read_text() == log
    before = LAST.stat().st_mtime_ns
    again = run(*AUTO)
    assert (again.code, again.err) == (0, "") and again.out == f"{FOLDER} is finished; nothing to do\n"
    assert LAST.stat().st_mtime_ns == before and os.listdir(FOLDER.parent) == ["version_0"]


def test_a_run_that_died_before_its_first_checkpoint_starts_afresh_in_its_folder(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, log = end_of(run)
    with dying(monkeypatch, epoch=0, batch=3):
        assert run(*AUTO).code == 130
    assert run(*AUTO).code == 0
    assert os.listdir(FOLDER.parent) == ["version_0"]
    assert all(torch.equal(value, final[name]) for name, value in weights(LAST).items())
    assert (FOLDER / "metrics.csv").read_text() == log


def test_training_that_is_over_but_not_tested_is_only_tested(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "test", dies)
        assert run(*AUTO).code == 130
    outcome = run(*AUTO)
    assert outcome.code == 0 and "epoch " not in outcome.out and "test_acc" in outcome.metrics
    assert run(*AUTO).out.endswith("is finished; nothing to do\n")


@pytest.mark.parametrize("changed", [("--lr", "0.01"), ("--seed", "1"), ("--max_epochs", "4"), ("--model.width", "5")])
def test_other_arguments_are_another_run(
    run: Callable, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, str]
) -> None:
    with dying(monkeypatch, epoch=1):
        run(*AUTO)
    assert run(*AUTO, *changed).code == 0
    assert sorted(os.listdir(FOLDER.parent)) == ["version_0", "version_1"]


def test_arguments_that_change_no_result_may_differ(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, epoch=1):
        run(*AUTO)
    free = ("--num_workers", "1", "--enable_progress_bar", "false", "--max_time", "01:00:00:00", "--async_save", "true")
    assert f"going on with {FOLDER}" in run(*AUTO, *free).out


def test_a_damaged_file_is_passed_over_with_a_warning(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    final, log = end_of(run)
    with dying(monkeypatch, epoch=2, batch=2):
        run(*AUTO)
    for file in (LAST, LAST.with_name("best.ckpt")):
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        # Between records there are bytes that mean nothing.
        content[largest.header_offset + largest.file_size // 2 + 200] ^= 1
        # Both names may be those of one file.
        file.unlink()
        file.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"last\.ckpt is damaged \(record .* fails its checksum\).*looking for an older"
    ):
        outcome = run(*AUTO)
    assert outcome.code == 0 and outcome.out.count("\nepoch ") == 2
    assert all(torch.equal(value, final[name]) for name, value in weights(LAST).items())
    assert (FOLDER / "metrics.csv").read_text() == log


def test_where_all_files_are_damaged_the_run_starts_afresh(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    final, log = end_of(run)
    with dying(monkeypatch, epoch=2):
        run(*AUTO)
    for file in LAST.parent.iterdir():
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="damaged"):
        assert run(*AUTO).code == 0
    assert all(torch.equal(value, final[name]) for name, value in weights(LAST).items())
    assert (FOLDER / "metrics.csv").read_text() == log


HOLDER = """
import sys
from pathlib import Path
from utils.run_state import hold
assert hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process, which is alive, holds a run."""
    import main

    command = [sys.executable, "-c", HOLDER, str(folder.resolve())]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=Path(main.__file__).parent, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield
    process.kill()
    process.communicate()


@pytest.mark.long
def test_two_processes_never_take_each_others_run(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, epoch=1):
        run(*AUTO)
    with held(FOLDER):
        refused = run(*AUTO, "--run_name", "version_0")
        assert refused.code == 2 and "another process, which is alive, holds that run" in refused.err
        # Nor can it be continued in another way meanwhile.
        last = run("--ckpt_path", "last")
        assert last.code == 2 and "another process, which is alive, holds the run" in last.err
        with dying(monkeypatch, epoch=1):
            run(*AUTO)
        assert sorted(os.listdir(FOLDER.parent)) == ["version_0", "version_1"]
    # The system has let go of the run of a killed process.
    assert "version_1" in run(*AUTO).out
    assert f"going on with {FOLDER}" in run(*AUTO).out
    assert run(*AUTO).out.endswith("is finished; nothing to do\n")


ASKER = """
import sys
from pathlib import Path
from utils.run_state import hold
print(hold(Path(sys.argv[1])), flush=True)
"""


FOLDS = pytest.param(("--num_folds", "3", "--fold", "all"), marks=pytest.mark.long)


@pytest.mark.parametrize("words", [("--run_name", "mine"), (), FOLDS], ids=str)
def test_a_run_is_held_before_it_begins(run: Callable, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    import engine
    import main

    answers = []

    class Asks(engine.Callback):
        def on_fit_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            command = [sys.executable, "-c", ASKER, str(Path(trainer.log_dir).resolve())]
            done = subprocess.run(command, cwd=Path(main.__file__).parent, capture_output=True, text=True)
            answers.append(done.stdout)

    original = main.callbacks
    monkeypatch.setattr(main, "callbacks", lambda *a: [*original(*a), Asks()])
    assert run("--max_epochs", "1", "--limit_train_batches", "1", *words).code == 0
    assert answers == ["False\n"] * (3 if "--fold" in words else 1)


def test_a_refused_process_leaves_the_lock_of_the_one_that_lives(run: Callable) -> None:
    (folder := Path("logs/standard_net/mine")).mkdir(parents=True)
    with held(folder):
        assert run(*RUN, "--run_name", "mine").code == 2
        assert (folder / ".lock").exists()
        assert run(*RUN, "--run_name", "mine", "--ckpt_path", "auto").code == 2


def test_a_lock_that_was_removed_keeps_nobody_out(tmp_path: Path) -> None:
    from utils.run_state import hold, release

    with held(tmp_path):
        (tmp_path / ".lock").unlink()
        # The other process holds a file that has no name any more.
        assert hold(tmp_path)
        release(tmp_path)


def test_a_finished_run_of_that_name_does_not_heed_other_arguments(run: Callable) -> None:
    named = (*RUN, "--run_name", "mine", "--ckpt_path", "auto")
    assert run(*named).code == 0
    outcome = run(*named, "--max_epochs", "5")
    assert outcome.code == 2 and "that run is finished, with another max_epochs; choose another name" in outcome.err


def test_a_named_run_is_that_run_whatever_it_was_started_with(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ("--run_name", "mine", "--ckpt_path", "auto")
    with dying(monkeypatch, epoch=1):
        run(*RUN, *named, "--lr", "0.01")
    # It goes on with its own arguments, as with `last`.
    assert run(*named).code == 0
    folder = Path("logs/standard_net/mine")
    assert "lr: 0.01" in (folder / "config.yaml").read_text()
    assert len([row for row in rows(folder / "metrics.csv") if row["val_loss"]]) == 3
    assert run(*named).out.endswith("mine is finished; nothing to do\n")
    assert run(*RUN, "--ckpt_path", "auto", "--run_name", "other").code == 0


def test_a_job_of_slurm_goes_on_with_its_own_run(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("17", "18"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with held(FOLDER) if job == "18" else dying(monkeypatch, epoch=9), dying(monkeypatch, epoch=1):
            run(*AUTO)
    assert json.loads((FOLDER / "environment.json").read_text())["job"] == "17"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert f"going on with {FOLDER}" in run(*AUTO).out
    # Its own run is finished; that of the other job is not its business.
    assert run(*AUTO).out == f"{FOLDER} is finished; nothing to do\n"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert "going on with logs/standard_net/version_1" in run(*AUTO).out


def test_a_run_that_max_time_has_stopped_is_not_finished(run: Callable) -> None:
    words = ("--max_epochs", "60", "--model.width", "4", "--ckpt_path", "auto")
    stopped = run(*words, "--max_time", "00:00:00:01")
    assert stopped.code == 0 and "max_time: stopped after" in stopped.out
    epochs = stopped.out.count("\nepoch ")
    assert epochs < 60
    outcome = run(*words)
    assert outcome.code == 0 and outcome.out.count("epoch ") >= 60 - epochs - 1


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_other_commands_need_a_checkpoint(run: Callable, command: str) -> None:
    outcome = run(command, "--ckpt_path", "auto")
    assert outcome.code == 2 and "needs --ckpt_path: best, last, or the path" in outcome.err


def test_cross_validation_starts_anew(run: Callable) -> None:
    outcome = run(*AUTO, "--num_folds", "2", "--fold", "all")
    assert outcome.code == 2 and "--fold all starts anew" in outcome.err


@pytest.mark.long
def test_several_processes_agree_on_the_run(project: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", "main.py", *AUTO]
    for expected in ("epoch 3/3", "version_0 is finished; nothing to do"):
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert os.listdir(project / FOLDER.parent) == ["version_0"]

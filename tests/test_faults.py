"""Faults as they are met on the command line: one line, an exit code, no traceback, nothing good lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

MAIN = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}" / "main.py"
SHORT = ("--limit_train_batches", "4", "--limit_val_batches", "2", "--limit_test_batches", "1", "--model.width", "64")
SHORT += ("--enable_model_summary", "false")
RUN = Path("logs/standard_net/version_0")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger; Python ignores the signal that would come with it, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(outcome: Any, code: int = 1) -> str:
    """The only line of the error stream."""
    assert outcome.code == code, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]


def weights(path: Path) -> list[Any]:
    return [*torch.load(path, weights_only=True)["state_dict"].values()]


# In a project of its own: in a repository, the differences to the last commit are saved, too, however large.


def test_a_disk_that_fills_up_ends_with_one_line_and_the_run_goes_on_once_there_is_space(
    run_in_project: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SHORT, "--max_epochs", "3")
    run_in_project(*words, "--experiment", "whole")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))

    with largest_file(unlimited[0]), monkeypatch.context() as patched:
        patched.setattr("engine.callbacks.RichProgressBar.on_train_epoch_start", fill)
        line = one_line(run_in_project(*words))
    assert "File too large" in line and "could not be written; those written before it stand" in line
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not [*Path("logs").rglob("*.tmp")]
    assert run_in_project(*words, "--ckpt_path", "auto").code == 0
    whole = Path("logs/whole/version_0/checkpoints/last.ckpt")
    for a, b in zip(weights(whole), weights(RUN / "checkpoints/last.ckpt"), strict=True):
        assert torch.equal(a, b)


def test_a_disk_that_fills_up_in_the_background_ends_with_one_line(run_in_project: Callable) -> None:
    with largest_file(50_000):
        assert "could not be written" in one_line(run_in_project(*SHORT, "--max_epochs", "3", "--async_save", "true"))


@pytest.mark.parametrize("size", [0, 500, 1500, 3000, 5000])
def test_a_disk_that_is_full_for_the_first_files_of_a_run_ends_with_one_line(
    size: int, run_in_project: Callable
) -> None:
    """Too small for the logs, config.yaml or environment.json."""
    with largest_file(size):
        one_line(run_in_project(*SHORT, "--max_epochs", "1"))
    assert not [*Path("logs").rglob("*.tmp")]


def test_a_run_folder_that_is_removed_ends_with_one_line(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.callbacks import RichProgressBar

    # From outside, when the second epoch begins.
    def remove(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            shutil.rmtree("logs")

    monkeypatch.setattr(RichProgressBar, "on_train_epoch_start", remove)
    line = one_line(run(*SHORT, "--max_epochs", "3"))
    assert "put the folder back" in line or "could not be written" in line


def test_a_loss_that_is_no_number_ends_with_one_line(run: Callable) -> None:
    line = one_line(run(*SHORT, "--lr", "1e6", "--optimizer", "SGD", "--max_epochs", "20"))
    assert "the loss is" in line and "detect_nonfinite warn" in line
    assert run(*SHORT, "--lr", "1e6", "--optimizer", "SGD", "--max_epochs", "20", "--detect_nonfinite", "off").code == 0


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in [f"{kind}/{number:02}.png" for kind in ("cat", "dog") for number in range(20)]:
        file = tmp_path / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pets"


PETS = ("--dataset", "folder_data", "--data.root", "pets", "--data.size", "16", "--batch_size", "4")
PETS += ("--max_epochs", "3", "--enable_model_summary", "false")


def cut_short(folder: Path) -> None:
    for file in sorted((folder / "cat").iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])


def test_a_picture_cut_short_ends_with_one_line_that_names_index_and_file(pets: Path, run: Callable) -> None:
    cut_short(pets)
    outcome = run(*PETS)
    line = one_line(outcome, outcome.code)
    name = line.split("pets/")[1][:10]
    index = [f"cat/{number:02}.png" for number in range(20)].index(name)
    assert outcome.code in (1, 2) and f"sample {index} " in line and "cannot be read" in line


@pytest.mark.parametrize("workers", ["0", "2"])
def test_pictures_cut_short_while_training_end_with_one_line(
    workers: str, pets: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.callbacks import RichProgressBar

    def cut(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            cut_short(pets)

    monkeypatch.setattr(RichProgressBar, "on_train_epoch_start", cut)
    line = one_line(run(*PETS, "--num_workers", workers))
    index = int(line.split("pets/cat/")[1][:2])
    assert f"sample {index} of FolderData cannot be read" in line


@pytest.mark.parametrize(
    "words", [("--max_time", "1 hour"), ("--max_time", "00:00:00:00"), ("--detect_nonfinite", "no")]
)
def test_wrong_arguments_about_faults_are_one_line_with_code_2(words: tuple[str, str], run: Callable) -> None:
    assert words[1] in one_line(run(*words), code=2)
    assert not RUN.exists()


def test_damaged_checkpoints_are_one_line_each(run: Callable) -> None:
    assert run(*SHORT, "--max_epochs", "1").code == 0
    file = RUN / "checkpoints/last.ckpt"
    file.unlink()
    file.write_bytes((RUN / "checkpoints/best.ckpt").read_bytes()[:-100])
    assert "is damaged" in one_line(run("--ckpt_path", "last"), code=2)
    assert "is damaged" in one_line(run("test", "--ckpt_path", "last"), code=2)
    assert run("test", "--ckpt_path", "best").code == 0


def test_max_time_ends_well_and_the_run_goes_on(run: Callable) -> None:
    outcome = run("--max_epochs", "500", "--max_time", "00:00:00:01", "--model.width", "8")
    assert outcome.code == 0 and "max_time: stopped after" in outcome.out and "test_acc" in outcome.metrics
    steps = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    again = run("--ckpt_path", "last", "--max_time", "00:00:00:01")
    assert again.code == 0
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] > steps


@pytest.mark.long
def test_a_job_that_is_preempted_is_requeued_and_ends_as_one_that_was_not(run: Callable, tmp_path: Path) -> None:
    words = (*SHORT, "--max_epochs", "12", "--report", "false")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    environment = {**os.environ, "SLURM_JOB_ID": "31", "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(MAIN), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("epoch  2/12"))
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "SIGUSR1: stopped after" in out and "Traceback" not in err
    assert (tmp_path / "calls").read_text() == "requeue 31\n"
    assert run(*words, "--ckpt_path", "auto").code == 0
    assert len([*RUN.parent.iterdir()]) == 1
    run(*words, "--experiment", "whole")
    whole = Path("logs/whole/version_0/checkpoints/last.ckpt")
    for a, b in zip(weights(whole), weights(RUN / "checkpoints/last.ckpt"), strict=True):
        assert torch.equal(a, b)

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


def test_a_disk_that_fills_up_ends_with_one_line_and_the_run_goes_on_once_there_is_space(run: Callable) -> None:
    run(*SHORT, "--max_epochs", "3", "--experiment", "whole")
    assert run(*SHORT, "--max_epochs", "1").code == 0
    saved = (RUN / "checkpoints/last.ckpt").read_bytes()
    with largest_file(50_000):
        line = one_line(run(*SHORT, "--max_epochs", "3", "--ckpt_path", "last"))
    assert "could not be written; those written before it stand" in line
    assert "File too large" in line
    assert (RUN / "checkpoints/last.ckpt").read_bytes() == saved
    assert not [*Path("logs").rglob("*.tmp")]
    assert run(*SHORT, "--max_epochs", "3", "--ckpt_path", "last", "--experiment", "standard_net").code == 0
    whole = Path("logs/whole/version_0/checkpoints/last.ckpt")
    for a, b in zip(weights(whole), weights(RUN / "checkpoints/last.ckpt"), strict=True):
        assert torch.equal(a, b)


def test_a_disk_that_fills_up_in_the_background_ends_with_one_line(run: Callable) -> None:
    with largest_file(50_000):
        assert "could not be written" in one_line(run(*SHORT, "--max_epochs", "3", "--async_save", "true"))


@pytest.mark.parametrize("size", [0, 500, 1500, 3000, 5000])
def test_a_disk_that_is_full_for_the_first_files_of_a_run_ends_with_one_line(size: int, run: Callable) -> None:
    """Too small for the logs, config.yaml or environment.json."""
    with largest_file(size):
        one_line(run(*SHORT, "--max_epochs", "1"))
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
    line = one_line(run(*SHORT, "--lr", "1e30", "--optimizer", "SGD", "--max_epochs", "3"))
    assert "the loss is" in line and "detect_nonfinite warn" in line
    assert run(*SHORT, "--lr", "1e30", "--optimizer", "SGD", "--max_epochs", "1", "--detect_nonfinite", "off").code == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_cut_short_ends_with_one_line_that_names_index_and_file(workers: str, run: Callable) -> None:
    draw = np.random.default_rng(0)
    for name in [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(20)]:
        file = Path("pets", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file)
    content = Path("pets/cat/7.png").read_bytes()
    Path("pets/cat/7.png").write_bytes(content[: len(content) // 2])
    words = ("--dataset", "folder_data", "--data.root", "pets", "--data.size", "16", "--num_workers", workers)
    line = one_line(run(*words, "--max_epochs", "2", "--batch_size", "4", "--enable_model_summary", "false"))
    assert "cat/7.png" in line and "sample " in line and "cannot be read" in line
    assert "mend it, or leave it out of the dataset" in line


@pytest.mark.parametrize("words", [("--max_time", "1 hour"), ("--max_time", "00:00:00:00"), ("--detect_nonfinite", "no")])
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


def test_a_job_that_is_preempted_is_requeued_and_ends_as_one_that_was_not(run: Callable, tmp_path: Path) -> None:
    words = (*SHORT, "--max_epochs", "30", "--save_every_n_steps", "3")
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
        next(line for line in process.stdout if line.startswith("epoch  2/30"))
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

"""Whole processes, as a shell starts and stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def start(project: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "main.py", *words]
    pipe = subprocess.PIPE
    # A shell starts what it puts into the background with Ctrl-C ignored, and that would be handed on.
    return subprocess.Popen(command, cwd=project, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_ctrl_c)


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.long
def test_ctrl_c_ends_a_run_cleanly_and_last_goes_on(project: Path) -> None:
    process = start(project, "--max_epochs", "500")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch   3/500"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "--ckpt_path last" in err
    resumed = start(project, "--ckpt_path", "last", "--max_epochs", "1000", "--limit_train_batches", "1")
    assert resumed.stdout is not None
    first = next(line for line in resumed.stdout if line.startswith("epoch"))
    assert int(first.split()[1].split("/")[0]) >= 3
    resumed.kill()
    resumed.communicate()


def test_two_processes_train_as_one_run(project: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--")
    process = start(project, "--max_epochs", "4", "--batch_size", "32", "--monitor", "val_acc", launcher=launcher)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # One run folder, one progress line for each epoch, one table: only one process talks and writes.
    assert [path.name for path in (project / "logs/standard_net").iterdir()] == ["version_0"]
    assert out.count("\nepoch ") == 4 and out.count("test_acc") == 1
    accuracy = float(next(line for line in out.splitlines() if line.startswith("test_acc")).split()[1])
    assert accuracy > 0.9
    # 269 test images are no multiple of 2: the same accuracy in one process means that each was counted once.
    alone = start(project, "test", "--ckpt_path", "best")
    out, err = alone.communicate(timeout=100)
    assert f"test_acc   {accuracy:.4f}" in out, err


def test_main_works_from_another_working_folder(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    command = [sys.executable, str(project / "main.py"), "--fast_dev_run", "true"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_signal_to_one_of_two_processes_stops_both_and_the_run_goes_on_to_the_same_log(project: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--")
    words = ("--max_epochs", "4", "--limit_train_batches", "10", "--model.width", "4", "--log_every_n_steps", "2")
    words += ("--save_every_n_steps", "5", "--ckpt_path", "auto")
    whole = start(project, *words, "--log_dir", "whole", launcher=launcher)
    assert whole.communicate(timeout=200) and whole.returncode == 0
    parts = start(project, *words, launcher=launcher)
    assert parts.stdout is not None
    for line in parts.stdout:
        if line.startswith("epoch 2/4"):
            break
    children = subprocess.run(["pgrep", "-P", str(parts.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[1]), signal.SIGTERM)
    out, _ = parts.communicate(timeout=100)
    assert "SIGTERM: stopped after" in out and "saved logs/standard_net/version_0/checkpoints/last.ckpt" in out
    again = start(project, *words, launcher=launcher)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0 and "going on with logs/standard_net/version_0" in out, err
    # Both processes' running means count, within the epoch too.
    logs = [(project / top / "standard_net/version_0/metrics.csv").read_text() for top in ("whole", "logs")]
    assert logs[0] == logs[1]

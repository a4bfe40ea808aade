"""`python main.py --devices 2`: main.py starts itself again, as torchrun would; real processes and real signals."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest

SMALL = ("--accelerator", "cpu", "--model.width", "4", "--limit_train_batches", "8", "--log_every_n_steps", "2")
TWO = (*SMALL, "--devices", "2")
LOGS = Path("logs/standard_net")
# A net of which the process of rank 1 fails, or all stand still, in a training step.
FAILING = '''"""Fails or stands still where it is told to."""
import os
import time

from model.standard_net import StandardNet


class FailingNet(StandardNet):
    """As its base."""

    def __init__(self, num_classes: int, sample_shape: list[int], width: int = 4, how: str = "fail") -> None:
        super().__init__(num_classes, sample_shape, width)
        self.how = how

    def forward(self, images):
        if self.training and self.how == "fail" and os.environ.get("RANK") == "1":
            raise ZeroDivisionError("this net fails")
        if self.training and self.how == "stand still":
            print("standing still", flush=True)
            time.sleep(600)
        return super().forward(images)
'''


def start(*words: str, launcher: tuple[str, ...] = (), ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    def dispose() -> None:
        # A shell starts what it puts into the background with Ctrl-C ignored, and that would be handed on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipe = subprocess.PIPE
    command = [sys.executable, *launcher, "main.py", *words]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=dispose, env=environment)


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process prints until a line begins with a text."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if line.startswith(text):
            return read
    raise AssertionError(f"{text!r} never came: {process.communicate()}")


def steps(file: Path) -> list[int]:
    with open(file, newline="") as content:
        return [int(row["step"]) for row in csv.DictReader(content) if row["train_loss_step"]]


@pytest.mark.long
def test_two_processes_are_one_run_and_other_commands_take_it_from_there(
    project: Path, run_in_project: Callable
) -> None:
    process = start(*TWO, "--max_epochs", "2", "--strategy", "ddp", ignored=(signal.SIGHUP,))
    assert process.stdout is not None
    # Under nohup the launcher ignores it as any other process does.
    read = wait_for(process, "epoch 1/2")
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    out = read + out
    assert out.count("\nepoch ") == 2 and out.count("test_acc ") == 1
    assert os.listdir(LOGS) == ["version_0"]
    # Half of what one process of the same batch size reads; the run says so for itself.
    config = (LOGS / "version_0" / "config.yaml").read_text()
    assert "\ndevices: 2\n" in config and "max_restarts" not in config
    tested = next(line for line in out.splitlines() if line.startswith("test_acc"))

    # Its devices and its strategy are those of training: predictions are made in one process.
    assert run_in_project("predict", "--ckpt_path", "best").code == 0
    assert len((LOGS / "version_0" / "predictions.csv").read_text().splitlines()) == 1 + 269
    refused = run_in_project("predict", "--ckpt_path", "best", "--devices", "2")
    assert refused.code == 2 and "predict runs in one process" in refused.err
    # A test runs in two again, and counts every sample once.
    process = start("test", "--ckpt_path", "best")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "") and tested in out and out.count("checkpoint ") == 1
    # Under another launcher there are as many processes as it has started.
    process = start(
        "test", "--ckpt_path", "best", launcher=("-m", "torch.distributed.run", "--nproc-per-node", "1", "--")
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and tested in out, err


@pytest.mark.long
def test_signals_reach_all_processes_which_save_and_go_on_later(project: Path) -> None:
    words = (*TWO, "--max_epochs", "500", "--ckpt_path", "auto")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)):
        process = start(*words)
        read = wait_for(process, "epoch")
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert "saved logs/standard_net/version_0/checkpoints/last.ckpt" in out
        assert "Traceback" not in err and "SignalException" not in err
        assert number == signal.SIGTERM or "going on with logs/standard_net/version_0" in read
    assert os.listdir(LOGS) == ["version_0"]
    seen = steps(LOGS / "version_0" / "metrics.csv")
    assert len(seen) > 10 and seen == sorted(set(seen))


@pytest.mark.long
def test_codes_are_those_of_the_processes(project: Path) -> None:
    (project / "model" / "failing_net.py").write_text(FAILING)
    # What only the Trainer notices.
    wrong = start(*TWO, "--limit_train_batches", "1.5", "--max_restarts", "2")
    out, err = wrong.communicate(timeout=300)
    assert wrong.returncode == 2 and "limit_train_batches" in err and "restart" not in err, err
    fails = start(*TWO, "--model_name", "failing_net", "--max_epochs", "1", "--monitor", "val_acc")
    out, err = fails.communicate(timeout=300)
    assert fails.returncode == 1 and err.count("ZeroDivisionError: this net fails") == 1, err
    assert "ChildFailedError" not in err and "torch/distributed/elastic" not in err


@pytest.mark.long
def test_all_folds_run_in_two_processes(project: Path) -> None:
    process = start(*TWO, "--fold", "all", "--num_folds", "2", "--max_epochs", "1")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert os.listdir(LOGS) == ["version_0"] and out.count("mean ± std") == 1
    there = sorted(path.name for path in (LOGS / "version_0").iterdir() if not path.name.startswith("events."))
    assert there == ["fold_0", "fold_1", "folds.csv", "report"]
    # Both processes together have judged each sample once.
    assert "val: 1,528 samples" in out or "of 1,528 are wrong" in (LOGS / "version_0/report/report.html").read_text()


@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once(project: Path) -> None:
    (project / "model" / "failing_net.py").write_text(FAILING)
    words = (*SMALL[:2], "--max_restarts", "1", "--model_name", "failing_net", "--model.how", "stand still")
    process = start(*words)
    wait_for(process, "standing still")
    process.send_signal(signal.SIGINT)
    # Longer than the agent would wait by itself: saving takes its time.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(33)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "start again" not in err


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What would have been started."""
    import main

    calls: list[Any] = []
    monkeypatch.setattr(main, "launch", lambda *given: calls.append(given) or {})
    yield calls


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["--devices", "2"], 2),
        (["--devices", "0,1,2"], 3),
        (["--devices", "[0, 1]"], 2),
        (["--max_restarts", "1"], 1),
        (["--config", "two.yaml"], 2),
        (["--devices", "1"], 0),
        (["--devices", "-1"], 0),
        (["--devices", "[1]"], 0),
    ],
)
def test_how_many_processes_are_started(
    words: list[str], processes: int, run: Callable, launched: list[Any], tmp_path: Path
) -> None:
    import main

    (tmp_path / "two.yaml").write_text("devices: 2\n")
    words = ["--accelerator", "cpu", "--fast_dev_run", "true", "--report", "false", *words]
    assert run(*words).code == 0
    restarts = int("--max_restarts" in words)
    assert launched == ([(processes, restarts, main.__file__, words)] if processes else [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "fast"], "--lr fast: give a number"),
        (["--patience", "0"], "--patience 0"),
        (["--ckpt_path", "none.ckpt"], "checkpoint none.ckpt does not exist"),
        (["--accelerator", "gpu", "--devices", "999"], "but this machine has .* GPU.*--accelerator cpu"),
        (["--accelerator", "gpu", "--devices", "[0, 999]"], "but this machine has .* GPU.*--accelerator cpu"),
        (["--devices", "two"], "devices='two'"),
        (["--devices", "0"], "devices=0"),
        (["--max_restarts", "-1"], "--max_restarts -1"),
        (["--num_nodes", "2"], "num_nodes=2, .* torchrun --nnodes 2 --nproc-per-node 2"),
        (["--fold", "all", "--num_folds", "2", "--max_restarts", "1"], "--fold all .*--max_restarts"),
        (["predict", "--ckpt_path", "best"], "no run has one"),
    ],
)
def test_what_is_wrong_is_said_before_any_process_starts(
    words: list[str], message: str, run: Callable, launched: list[Any], tmp_path: Path
) -> None:
    command = [word for word in words[:1] if not word.startswith("-")]
    outcome = run(*command, "--devices", "2", *words[len(command) :])
    assert outcome.code == 2 and not launched
    assert re.fullmatch(f"error: .*{message}.*\n", outcome.err), outcome.err
    assert not list(tmp_path.glob("logs/*/*"))


@pytest.mark.parametrize("told", [None, "0", "1"])
def test_a_launcher_with_another_number_of_restarts_is_told_so(
    told: str | None, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    if told is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", told)
    outcome = run("--max_restarts", "2", "--fast_dev_run", "true")
    assert outcome.code == 2 and f"has {told or 0}; give the number to it: torchrun --max-restarts 2" in outcome.err


def test_elsewhere_the_trainer_says_which_command_starts_as_many() -> None:
    with pytest.raises(engine.MisconfigurationException, match="torchrun --nproc-per-node 2 -- main.py"):
        engine.Trainer(devices=2, accelerator="cpu")

"""`--max_restarts`: processes are killed, all start again, and the run ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RUN = ("--accelerator", "cpu", "--model_name", "mortal_net", "--max_epochs", "3", "--limit_train_batches", "4")
RUN += ("--log_every_n_steps", "1", "--save_every_n_steps", "3", "--monitor", "val_acc")
LOGS = Path("logs/mortal_net")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--")
# DEATHS="0:7 1:2" kills the last process in its 7th training step, and after the first restart in its 2nd.
MORTAL = '''"""Dies where the environment says so."""
import os
import signal

from model.standard_net import StandardNet

DEATHS = dict(part.split(":") for part in os.environ.get("DEATHS", "").split())


class MortalNet(StandardNet):
    """As its base, of 4 channels."""

    def __init__(self, num_classes: int, sample_shape: list[int]) -> None:
        super().__init__(num_classes, sample_shape, width=4)
        self.steps = 0

    def forward(self, images):
        self.steps += self.training
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if last and str(self.steps) == DEATHS.get(os.environ.get("TORCHELASTIC_RESTART_COUNT")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
'''


@pytest.fixture
def mortal(project: Path) -> Path:
    """A project with a net that dies."""
    (project / "model" / "mortal_net.py").write_text(MORTAL)
    return project


def start(deaths: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run main.py to its end."""
    command = [sys.executable, *launcher, "main.py", *words]
    environment = {**os.environ, "DEATHS": deaths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def result(run: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What a run ended with: its weights, and all that it has logged."""
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return weights, (run / "metrics.csv").read_text()


def assert_same(run: Path, whole: Path) -> None:
    (weights, log), (expected, expected_log) = result(run), result(whole)
    assert log == expected_log
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())


@pytest.mark.long
def test_one_of_two_processes_is_killed_and_the_run_ends_by_itself(mortal: Path) -> None:
    two = (*RUN, "--devices", "2")
    whole = start("", *two, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    # After a checkpoint within the second epoch, and again.
    killed = start("0:8 1:3", *two, "--max_restarts", "2")
    assert killed.returncode == 0, killed.stderr
    for number in (1, 2):
        told = (
            f"process 1 was killed by SIGKILL (mostly because memory ran out); all start again, restart {number} of 2\n"
        )
        assert told in killed.stderr
    assert killed.stdout.count("going on with logs/mortal_net/version_0") == 2
    assert "test_acc" in killed.stdout and sorted(os.listdir(LOGS)) == ["version_0", "whole"]
    assert_same(LOGS / "version_0", LOGS / "whole")
    # The same under the user's own launcher, which has a store that outlives its processes.
    killed = start("0:8", *two, "--experiment", "other", launcher=TORCHRUN)
    assert killed.returncode == 0, killed.stderr
    assert "going on with logs/other/version_0" in killed.stdout and os.listdir("logs/other") == ["version_0"]
    assert_same(Path("logs/other/version_0"), LOGS / "whole")


def interrupted(run_in_project: Callable, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run of the same arguments that is left unfinished."""
    import engine

    with monkeypatch.context() as patch:

        def interrupt(*given: object, **named: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(engine.Trainer, "test", interrupt)
        assert run_in_project(*words).code == 130


@pytest.mark.long
def test_what_died_before_it_saved_begins_anew_in_its_folder_and_leaves_others_alone(
    mortal: Path, run_in_project: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(run_in_project, monkeypatch, *RUN)
    older = (LOGS / "version_0" / "metrics.csv").read_text()
    killed = start("0:1", *RUN, "--max_restarts", "1")
    assert killed.returncode == 0, killed.stderr
    assert sorted(os.listdir(LOGS)) == ["version_0", "version_1"]
    assert (LOGS / "version_0" / "metrics.csv").read_text() == older
    assert "going on with logs/mortal_net/version_0" in run_in_project(*RUN, "--ckpt_path", "auto").out
    assert_same(LOGS / "version_1", LOGS / "version_0")


@pytest.mark.long
def test_a_start_from_a_checkpoint_that_was_named_loses_nothing(mortal: Path, run_in_project: Callable) -> None:
    assert run_in_project(*RUN, "--run_name", "first").code == 0
    more, best = (*RUN, "--max_epochs", "5"), LOGS / "first" / "checkpoints" / "best.ckpt"
    assert run_in_project(*more, "--ckpt_path", str(best), "--run_name", "whole").code == 0
    # The newest best is that of the first run again.
    os.utime(best)
    # It dies before it has saved anything itself, then after that, and begins from the one and from the other.
    killed = start("0:1 1:6", *more, "--ckpt_path", "best", "--max_restarts", "2")
    assert killed.returncode == 0, killed.stderr
    assert sorted(os.listdir(LOGS)) == ["first", "version_0", "whole"]
    assert killed.stdout.count("going on with") == 1
    assert_same(LOGS / "version_0", LOGS / "whole")


@pytest.mark.long
def test_restarts_are_used_up(mortal: Path) -> None:
    killed = start("0:2 1:2", *RUN, "--max_restarts", "1")
    assert killed.returncode == 128 + signal.SIGKILL
    first, last = killed.stderr.splitlines()
    assert first.endswith("all start again, restart 1 of 1")
    assert last == (
        "error: process 0 was killed by SIGKILL (mostly because memory ran out), after 1 restart; "
        "where a checkpoint was saved, --ckpt_path auto goes on"
    )

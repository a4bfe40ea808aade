"""The job file for Slurm, run by bash with stand-ins for `srun` and `scontrol`, since no Slurm can be asked for.

The stand-ins do what Slurm 22.05 was seen to do with this file: the variables below were recorded there, as were its
deeds. srun starts the tasks, ends the others when one has failed, and exits with the highest of their codes, so that a
failure may end with 143; requeuing ends the tasks by SIGTERM; a preempted job is told by its PreemptTime.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SRUN = """#!/bin/sh
''''exec "{python}" "$0" "$@" #'''
import os, signal, subprocess, sys, time
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    assert words.pop(0) in ("--kill-on-bad-exit=1", "--cpus-per-task=" + os.environ["SLURM_CPUS_PER_TASK"])
number, on_each = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
places = [{{"SLURM_PROCID": i, "SLURM_LOCALID": i % on_each, "SLURM_NODEID": i // on_each}} for i in range(number)]
tasks = []
for place in places:
    # One group, which a signal reaches at once.
    environment, group = os.environ | {{k: str(v) for k, v in place.items()}}, tasks[0].pid if tasks else 0
    tasks.append(subprocess.Popen(words, env=environment, process_group=group))
with open("tasks.tmp", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
os.rename("tasks.tmp", "tasks.txt")
while not any(task.poll() for task in tasks) and None in [task.poll() for task in tasks]:
    time.sleep(0.01)
for signal_number in (signal.SIGTERM, signal.SIGKILL):
    for task in tasks:
        task.send_signal(signal_number)
    for _ in range(1000):
        time.sleep(0.01 * (None in [task.poll() for task in tasks]))
sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))
"""
SCONTROL = """#!/bin/sh
''''exec "{python}" "$0" "$@" #'''
import os, signal, sys, time
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", "second", sep="\\n")
    sys.exit(0)
if sys.argv[1:3] == ["show", "job"]:
    when = "2026-11-21T23:08:22" if os.path.exists("preempted.txt") else "None"
    print(f"JobId={{sys.argv[3]}} JobName=train\\n   PreemptEligibleTime=2026-11-21T23:00:00 PreemptTime={{when}}")
    sys.exit(0)
tasks = [int(task) for task in open("tasks.txt").read().split()]
# A busy controller takes its time.
time.sleep(3)
with open("scontrol.txt", "a") as file:
    print(*sys.argv[1:], file=file)
for task in tasks:
    try:
        os.kill(task, signal.SIGTERM)
    except ProcessLookupError:
        pass
"""
# In place of Python: tells what it was given.
TELLS = """#!/bin/sh
''''exec "{python}" "$0" "$@" #'''
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
with open(f"told-{{os.environ['RANK']}}.json", "w") as file:
    json.dump({{"words": sys.argv[1:], **{{name: os.environ[name] for name in names}}}}, file)
"""
PYTHON = '#!/bin/bash\nexec "{python}" "$@"\n'


@pytest.fixture
def job(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts the job file as Slurm does: `job("--lr", "0.1", python=TELLS, SLURM_JOB_ID="7")`."""
    script = (project / "slurm.sh").read_text()
    nodes, tasks = (int(re.search(rf"^#SBATCH --{n}=(\d+)", script, re.M)[1]) for n in ("nodes", "ntasks-per-node"))  # type: ignore[index]
    given = {
        "SLURM_JOB_ID": "41",
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_JOB_NODELIST": "one",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def start(*words: str, python: str = PYTHON, **variables: str) -> subprocess.Popen[str]:
        folder = project / "stand-ins"
        folder.mkdir(exist_ok=True)
        (project / "tasks.txt").unlink(missing_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
            (folder / name).write_text(text.format(python=sys.executable))
            (folder / name).chmod(0o755)
        path = {"PATH": f"{folder}:{os.environ['PATH']}"}
        pipe = subprocess.PIPE
        environment = {**os.environ, **given, **path, **variables}
        command = ["bash", "slurm.sh", *words]
        return subprocess.Popen(command, cwd=project, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def told(project: Path) -> list[dict[str, Any]]:
    files = sorted(project.glob("told-*.json"))
    return [json.loads(file.read_text()) for file in files]


def signal_all(project: Path) -> None:
    """Send SIGUSR1 to all tasks, as Slurm does."""
    end = time.monotonic() + 30
    while not (project / "tasks.txt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(int((project / "tasks.txt").read_text().split()[0]), signal.SIGUSR1)


def requeued(project: Path) -> list[str]:
    file = project / "scontrol.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_bash_can_read_it_and_sbatch_finds_its_options_at_the_top(project: Path) -> None:
    script = project / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text().splitlines()
    assert len(lines) <= 40 and lines[0] == "#!/bin/bash"
    # sbatch reads them up to the first line that is neither a comment nor empty.
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) >= 9 and max(options) < code
    assert all(re.match(r"#SBATCH --[a-z-]+(=\S+)?(\s+#.*)?$", lines[number]) for number in options)


def test_a_task_for_each_process_knows_its_place_and_gets_every_flag(
    job: Callable[..., subprocess.Popen[str]], project: Path
) -> None:
    words = ("--lr", "0.01", "--experiment", "a $HOME 'name'")
    process = job(*words, python=TELLS, SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2", SLURM_JOB_NODELIST="one,second")
    assert process.wait() == 0, process.communicate()
    tasks = told(project)
    assert [task["RANK"] for task in tasks] == ["0", "1", "2", "3"]
    assert [task["LOCAL_RANK"] for task in tasks] == ["0", "1", "0", "1"]
    for task in tasks:
        assert (task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"], task["MASTER_ADDR"]) == ("4", "2", "127.0.0.1")
        assert task["words"] == ["main.py", "--ckpt_path", "auto", *words] and task["OMP_NUM_THREADS"] == "4"
    # Another job on the same machine.
    process = job(python=TELLS, SLURM_JOB_ID="42")
    assert process.wait() == 0, process.communicate()
    ports = {int(task["MASTER_PORT"]) for task in (tasks[0], told(project)[0])}
    assert len(ports) == 2 and all(1024 < port < 32768 for port in ports)


def test_each_task_of_an_array_has_a_seed_of_its_own(job: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "44"}
    assert job("--lr", "0.1", python=TELLS, **array).wait() == 0
    assert told(project)[1]["words"] == ["main.py", "--ckpt_path", "auto", "--seed", "3", "--lr", "0.1"]


FAILS = '#!/bin/bash\n[ "$RANK" = 1 ] && exit 3\nexec sleep 60\n'


@pytest.mark.long
def test_a_process_that_fails_ends_the_job(job: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    assert job(python=FAILS).wait(timeout=30) == 143
    assert requeued(project) == []


@pytest.mark.long
def test_what_preemption_has_ended_is_put_back_into_the_queue(
    job: Callable[..., subprocess.Popen[str]], project: Path
) -> None:
    (project / "preempted.txt").touch()
    assert job(python=TELLS).wait(timeout=30) == 0
    assert requeued(project) == []
    # As main.py ends after SIGTERM.
    assert job(python="#!/bin/bash\nexit 143\n").wait(timeout=30) == 143
    assert requeued(project) == ["requeue 41"]


@pytest.mark.parametrize(
    ("variables", "name"),
    [({}, "41"), ({"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "44"}, "41_3")],
    ids=["job", "array"],
)
def test_the_signal_outside_of_training_puts_the_job_back_into_the_queue(
    job: Callable[..., subprocess.Popen[str]], project: Path, variables: dict[str, str], name: str
) -> None:
    process = job(python="#!/bin/bash\necho here\nexec sleep 60\n", **variables)
    assert process.stdout is not None and [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    signal_all(project)
    assert process.wait(timeout=30) == 138
    assert requeued(project) == [f"requeue {name}"]


@pytest.mark.long
def test_the_signal_before_the_end_saves_and_requeues_and_the_next_start_goes_on(
    job: Callable[..., subprocess.Popen[str]], project: Path
) -> None:
    words = ("--max_epochs", "6", "--limit_train_batches", "10", "--model.width", "4", "--log_every_n_steps", "1")
    first = job(*words)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("epoch 2/6"):
            break
    signal_all(project)
    out, err = first.communicate(timeout=400)
    last = "logs/standard_net/version_0/checkpoints/last.ckpt"
    assert first.returncode != 0 and f"saved {last}" in out, err
    # The process of rank 0 was left alone until Slurm had answered.
    assert "Slurm: job 41 is in the queue again" in out, err
    assert requeued(project) == ["requeue 41"]
    second = job(*words, SLURM_RESTART_COUNT="1")
    out, err = second.communicate(timeout=400)
    assert second.returncode == 0 and "going on with logs/standard_net/version_0" in out, err
    assert "epoch 6/6" in out and "epoch 2/6" not in out and "test_acc" in out
    assert os.listdir(project / "logs/standard_net") == ["version_0"]
    with open(project / "logs/standard_net/version_0/metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss_step"]]
    assert steps == list(range(60))

"""Every command that the README of a generated project shows runs, for each task, on files such as it speaks of."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# By words in a command: why it cannot run here.
NOT_RUN = {"--data.name CIFAR10": "downloads", "--pretrained DEFAULT": "downloads", "--devices 0,2": "takes GPUs"}
# These take a cluster or a second machine; a shell can read them, at least.
READ_ONLY = ("sbatch ", "torchrun --nnodes 2 ")
QUICK = "--limit_train_batches 2 --limit_val_batches 2 --limit_test_batches 2 --enable_progress_bar false"
# Makes an array of samples for --input: the shape is the task's own.
ARRAY = """
import numpy
from data.standard_data import StandardData
samples = StandardData("test")
numpy.save("new.npy", numpy.stack([numpy.asarray(samples[number][0]) for number in range(3)]))
"""


def commands_of(project: Path) -> list[str]:
    """Commands in the bash blocks of a project's README, without comments."""
    readme = (project / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)).splitlines()
    return [command for line in lines if (command := re.sub(r"\s+#.*", "", line).strip())]


def limited(command: str) -> str:
    """A command that trains, with limits appended; any other as it is."""
    words = command.split()
    if words[:2] != ["python", "main.py"] or "--find_" in command or (words[2:] and words[2][:2] != "--"):
        return command
    # A run has to be longer than its warmup.
    more = [QUICK, *(["--warmup_steps 1"] if "--warmup_steps" in words else [])]
    return " ".join([command, "--max_epochs 2", *more, *([] if "--report" in words else ["--report false"])])


def in_shell(command: str, folder: Path) -> str | None:
    """Run a command, or only read it; returns what it says if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    words = ["bash", *(["-n"] if command.startswith(READ_ONLY) else []), "-c", command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout[-300:] + done.stderr[-1000:] if done.returncode else None


def in_this_process(command: str) -> str | None:
    """As `in_shell`, in the working folder; a process of its own would import torch every time."""
    try:
        importlib.import_module("main").main(shlex.split(command)[2:])
    except SystemExit as end:
        return f"exit code {end.code}" if end.code else None
    except Exception as error:
        return repr(error)
    return None


def write_tables(project: Path) -> None:
    """Tables: of houses, of a shop that says which part a row is of, and a split; texts."""
    (project / "datasets").mkdir()
    rows = [f"{n % 7},{n % 5},{n / 3:.2f}" for n in range(200)]
    (project / "datasets/houses.csv").write_text("\n".join(["a,b,price", *rows]) + "\n", encoding="utf-8")
    parts = ["train", "train", "val", "test"]
    shop = [f"{row},{parts[number % 4]}" for number, row in enumerate(rows)]
    (project / "datasets/shop.csv").write_text("\n".join(["a,b,price,part", *shop]) + "\n", encoding="utf-8")
    split = [f"{number},{parts[number % 4]}" for number in range(80)]
    (project / "my_split.csv").write_text("\n".join(["sample,split", *split]) + "\n", encoding="utf-8")
    # No piece of it is like another: they would be found in two splits.
    text = "".join(f"To be {number}, or not to be? " for number in range(2000))
    (project / "datasets/shakespeare.txt").write_text(text, encoding="utf-8")
    (project / "letter.txt").write_text("To be, or not to be? " * 10, encoding="utf-8")


def write_pictures(project: Path) -> None:
    """Pictures in folders of their classes, and some of a holiday."""
    for number in range(40):
        for file in (f"datasets/pets/{('cat', 'dog')[number % 2]}/{number}.png", f"holiday/{number}.png"):
            (project / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (80, 80), 6 * number).save(project / file)


@pytest.fixture
def prepared(of_task: Path) -> Path:
    """A project with a run, and with what its README speaks of."""
    write_tables(of_task)
    write_pictures(of_task)
    for name in ("day", "night", "rain", "my_data"):
        text = (of_task / "data/standard_data.py").read_text(encoding="utf-8")
        text = text.replace("StandardData", name.title().replace("_", ""))
        (of_task / "data" / f"{name}.py").write_text(text, encoding="utf-8")
    assert in_shell(f"python main.py --max_epochs 1 {QUICK} && python -c '{ARRAY}'", of_task) is None
    shutil.copy(of_task / "logs/standard_net/version_0/checkpoints/best.ckpt", of_task / "net.ckpt")
    table = of_task / "data/diabetes.csv"
    names = ["file", *(f"holiday/{number}.png" for number in range(3))]
    new = table.read_text(encoding="utf-8").splitlines()[:4] if table.exists() else names
    (of_task / "new.csv").write_text("\n".join(new) + "\n", encoding="utf-8")
    return of_task


@pytest.mark.long
def test_every_command_of_a_readme_runs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [limited(command) for command in commands_of(prepared)]
    assert len(commands) > 30
    failed = {}
    for number, command in enumerate(commands):
        if any(words in command for words in NOT_RUN):
            continue
        # Each in a copy of its own, so that `best` and `last` mean the same run to all.
        folder = Path(shutil.copytree(prepared, tmp_path / str(number)))
        monkeypatch.chdir(folder)
        alone = not command.startswith("python main.py") or "--devices" in command
        fault = in_shell(command, folder) if alone else in_this_process(command)
        if fault is not None:
            failed[command] = fault + capsys.readouterr().err[-1000:]
        shutil.rmtree(folder)
    assert failed == {}


def test_what_is_not_run_is_there(generated_of_task: Path) -> None:
    shown = commands_of(generated_of_task)
    for words in (*NOT_RUN, *READ_ONLY):
        pictures = words in ("--data.name CIFAR10", "--pretrained DEFAULT")
        there = any(words in command for command in shown)
        assert there == (not pictures or generated_of_task.name == "image_classification"), words

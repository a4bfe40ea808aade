"""A project from Python and notebooks: the code that its README shows, run as it stands."""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# What three epochs of its example net reach, less a margin.
LEARNED = {"image_classification": ("test_acc", 0.3), "tabular_regression": ("test_r2", 0.2)}
LEARNED["language_model"] = ("test_acc", 0.2)
SHORT = ["--max_epochs", "1", "--limit_train_batches", "1", "--limit_val_batches", "1", "--limit_test_batches", "1"]


def blocks(project: Path) -> list[str]:
    """The code under "From Python"; other blocks are parts of a file, or for those who have exported something."""
    section = (project / "README.md").read_text(encoding="utf-8").split("\n## From Python\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def execute(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "block"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_readme_shows_two_blocks_of_the_length_it_says(generated_of_task: Path) -> None:
    without_main, sweep = blocks(generated_of_task)
    assert len([line for line in without_main.splitlines() if line]) <= 13
    assert len([line for line in sweep.splitlines() if line]) <= 20


def test_a_run_without_main(of_task: Path) -> None:
    names = execute(blocks(of_task)[0])
    metric, least = LEARNED[of_task.name]
    assert names["results"][0][metric] > least


@pytest.mark.long
def test_an_optuna_sweep(of_task: Path) -> None:
    names = execute(blocks(of_task)[1])
    study = names["study"]
    assert len(study.trials) == 5 and 0 < study.best_value <= 1
    folders = {path.name for path in (of_task / "logs/search").iterdir()}
    assert folders == {f"version_{number}" for number in range(5)}


def test_main_returns_the_metrics(run: Callable) -> None:
    metrics = run("--fast_dev_run", "true").metrics
    assert {"train_loss", "val_loss", "val_acc", "test_loss", "test_acc", "test_f1"} <= set(metrics)
    assert all(type(value) is float for value in metrics.values())


def test_every_command_that_the_readme_shows_is_understood(of_task: Path) -> None:
    for name in ("day", "night", "rain", "my_data"):
        text = (of_task / "data/standard_data.py").read_text().replace("StandardData", name.title().replace("_", ""))
        (of_task / "data" / f"{name}.py").write_text(text)
    net = (of_task / "model/standard_net.py").read_text().replace("StandardNet", "MyNet")
    (of_task / "model/my_net.py").write_text(net)
    importlib.import_module("main").main([*SHORT, "--report", "false"])
    shutil.copy("logs/standard_net/version_0/checkpoints/best.ckpt", "net.ckpt")
    from data import DInterface
    from model import MInterface
    from utils.arguments import parse

    readme = (of_task / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python main\.py((?: [^\n`#|]+)?)", readme)
    assert len(commands) >= 20
    for command in commands:
        words = command.split()
        if "--help" not in words:
            parse(words, (DInterface, MInterface))


def test_bad_input_raises_system_exit_in_python_too(run: Callable) -> None:
    import main

    with pytest.raises(SystemExit) as end:
        main.main(["--lr", "fast"])
    assert end.value.code == 2

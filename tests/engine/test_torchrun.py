"""Two processes under a real torchrun agree with each other and with one process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
from toy import dataset, trainer

HERE = Path(__file__).parent
PATHS = [str(Path(engine.__file__).parents[1]), str(HERE)]


def run(folder: Path, scenarios: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / "two_processes.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [",".join(scenarios), *PATHS]
    return subprocess.run(command + arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def results(folder: Path, scenarios: list[str], processes: int) -> dict[str, list[dict[str, Any]]]:
    """Per scenario, per process, what it wrote. All run in one start of Python, which is what takes the time."""
    done = run(folder, scenarios, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [json.loads((folder / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return results(folder, ["train", "evaluate", "sets"], 1)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return results(folder, ["train", "evaluate", "sets", "resume", "stop", "devices"], 2)


def test_both_processes_have_the_same_weights(two: Any) -> None:
    first, second = two["train"]
    assert first["weights"] == second["weights"] and first["steps"] == second["steps"] == 9


def test_two_processes_train_to_the_weights_of_one_on_the_same_global_batches(one: Any, two: Any) -> None:
    assert two["train"][0]["weights"] == pytest.approx(one["train"][0]["weights"], rel=0, abs=1e-6)


def test_metrics_of_two_processes_are_those_of_one(one: Any, two: Any) -> None:
    expected = one["train"][0]["metrics"]
    for process in two["train"]:
        assert process["metrics"].keys() == expected.keys()
        for name in expected.keys() - {"own_rank", "train_loss_step"}:
            assert process["metrics"][name] == pytest.approx(expected[name], abs=1e-6), name
    # Without sync_dist every process has its own value.
    assert [process["metrics"]["own_rank"] for process in two["train"]] == [0.0, 1.0]


def test_one_process_writes(one: Any, two: Any, folder: Path) -> None:
    assert sorted(os.listdir(folder / "train2" / "c")) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert sorted(os.listdir(folder / "train2")) == ["c", "v"]
    files = [folder / f"train{n}" / "v" / "metrics.csv" for n in (1, 2)]
    single, double = (list(csv.DictReader(file.open(newline=""))) for file in files)
    assert [(row["step"], row["epoch"]) for row in single] == [(row["step"], row["epoch"]) for row in double]
    for name in ("train_loss_step", "train_loss_epoch", "val_loss", "accuracy"):
        values = [[float(row[name]) for row in rows if row[name]] for rows in (single, double)]
        assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_evaluation_of_an_uneven_set_counts_every_sample_once(one: Any, two: Any) -> None:
    first, second = two["evaluate"]
    targets = dataset(7)[:][1]
    assert first == second and first == pytest.approx(one["evaluate"][0], abs=1e-6)
    assert first["samples"] == 7
    assert first["average"] == pytest.approx(float(targets.mean()), abs=1e-6)
    assert first["largest"] == pytest.approx(float(targets.max()))
    assert first["smallest"] == pytest.approx(float(targets.min()))


def test_named_sets_and_their_mean_are_those_of_one_process(one: Any, two: Any) -> None:
    [single], (first, second) = one["sets"], two["sets"]
    assert first == second
    assert first["metrics"] == pytest.approx(single["metrics"], abs=1e-6)
    day, night = dataset(7)[:][1], dataset(3)[:][1]
    [of_day, of_night] = first["results"]
    both = (float(day.sum()) + float(night.sum())) / 10
    assert [of_day["average"], of_night["mean"]] == pytest.approx([both, both], abs=1e-6)
    assert of_night["average/night"] == pytest.approx(float(night.mean()), abs=1e-6)
    assert (of_day["samples/day"], of_night["samples/night"], of_day["samples"]) == (7, 3, 10)
    assert of_day["largest"] == pytest.approx(float(max(day.max(), night.max())))


def test_two_processes_resume_to_the_same_bits(two: Any) -> None:
    assert two["resume"] == [{"same": True, "epoch": 3}] * 2


def test_a_stop_that_one_process_sees_ends_both(two: Any) -> None:
    assert two["stop"] == [{"epochs": 3}] * 2


def test_as_many_devices_as_processes_are_accepted(two: Any) -> None:
    assert two["devices"] == [{"ok": True}] * 2


@pytest.mark.long
def test_a_failure_of_one_process_ends_both(folder: Path) -> None:
    done = run(folder, ["fail"], 2)
    assert done.returncode != 0
    assert "ZeroDivisionError: on rank 1" in done.stderr


def test_more_devices_than_processes_raise_with_the_command() -> None:
    with pytest.raises(engine.MisconfigurationException, match="torchrun --nproc-per-node 2 -- main.py"):
        trainer(devices=2)
    assert trainer(devices=1) and trainer(devices="auto")

"""Runs that are killed at random moments end with the bits of one that was not; and differing bits are found.

`make chaos` is the long version.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

# test_kills.py in tests/engine has shorter ones for every run.
pytestmark = pytest.mark.long

TOOL = Path(__file__).parents[1] / "tools" / "chaos.py"
KILLS, SCENARIOS = 14, ["accumulation", "ema", "async", "workers"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The tool's process, the folder that it left, and its numbers by scenario."""
    folder = tmp_path_factory.mktemp("chaos")
    file = folder / "numbers.json"
    # A process of its own: it forks, which one with threads must not.
    words = ["--kills", str(KILLS), "--scenarios", *SCENARIOS, "--folder", str(folder), "--json", str(file)]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300)
    assert file.exists(), done.stderr
    return done, folder, {report["scenario"]: report for report in json.loads(file.read_text())}


def test_killed_runs_end_with_the_same_bits(killed):
    done, _, reports = killed
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(reports) == SCENARIOS
    assert not any(report["differences"] for report in reports.values())


def test_kills_strike_inside_writes_in_validation_at_epoch_ends_and_elsewhere(killed):
    *_, reports = killed
    kills = sum((Counter(report["kills"]) for report in reports.values()), Counter())
    assert kills.total() == KILLS
    assert kills["writing"] >= 4 and reports["async"]["kills"]["writing"] >= 1
    assert all(kills[phase] for phase in ("validation", "epoch end", "renaming", "test", "training", "start"))
    assert all(report["starts"] > report["runs"] >= 1 for report in reports.values())


@pytest.mark.long
def test_two_processes_that_train_together_end_with_the_same_bits(tmp_path):
    words = ["--kills", "4", "--scenarios", "within epochs", "async", "--processes", "2", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = torch.load(only(tmp_path / "async" / "reference", "checkpoints/last.ckpt"), weights_only=True)
    assert checkpoint["env"]["world_size"] == 2


@pytest.fixture
def pair(killed, load, tmp_path):
    """What the tool compares with, and two folders of the same run."""
    reference = killed[1] / "ema" / "reference"
    shutil.copytree(reference, tmp_path / "run")
    compare = load("tools/comparison.py").compare
    assert compare(reference, tmp_path / "run") == []
    return compare, reference, tmp_path / "run"


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(f"logs/*/*/{pattern}")
    return file


@pytest.mark.parametrize("part", ["state_dict", "current_model_state"])
@pytest.mark.parametrize("name", ["last", "best"])
def test_one_bit_of_a_weight_is_found(pair, name, part):
    compare, reference, run = pair
    file = only(run, f"checkpoints/{name}.ckpt")
    content = torch.load(file, weights_only=True)
    content[part]["net.classify.3.bias"].view(torch.int32)[0] ^= 1
    torch.save(content, file)
    (difference,) = compare(reference, run)
    assert difference.startswith(f"{name}.ckpt['{part}']['net.classify.3.bias']: ")


def test_one_number_of_the_optimizer_is_found(pair):
    compare, reference, run = pair
    file = only(run, "checkpoints/last.ckpt")
    content = torch.load(file, weights_only=True)
    content["optimizer_states"][0]["param_groups"][0]["lr"] *= 1 + 1e-15
    torch.save(content, file)
    (difference,) = compare(reference, run)
    assert difference.startswith("last.ckpt['optimizer_states'][0]['param_groups'][0]['lr']: ")


def test_a_row_twice_and_a_missing_row_are_found(pair):
    compare, reference, run = pair
    file = only(run, "metrics.csv")
    lines = file.read_text().splitlines(keepends=True)
    for changed in ([*lines, lines[-1]], lines[:-1]):
        file.write_text("".join(changed))
        (difference,) = compare(reference, run)
        assert difference.startswith("metrics.csv: ")


def test_values_twice_in_tensorboard_are_found(pair):
    compare, reference, run = pair
    for number, file in enumerate(sorted(only(run, "metrics.csv").parent.glob("events.out.*"))):
        shutil.copy(file, file.with_name(f"{file.name}.{number}"))
    assert all(difference.startswith("TensorBoard ") for difference in compare(reference, run)[:3])


def test_files_left_over_other_runs_and_other_results_are_found(pair):
    compare, reference, run = pair
    (only(run, "checkpoints") / "last.ckpt.tmp").touch()
    (other := only(run, "config.yaml").parents[1] / "version_1").mkdir()
    (other / "metrics.csv").touch()
    (run / "results.json").write_text("{}")
    assert [difference.split(":")[0] for difference in compare(reference, run)] == ["run folders", "files", "results"]


def test_a_run_that_is_not_marked_as_finished_is_found(pair):
    compare, reference, run = pair
    file = only(run, "environment.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))
    assert compare(reference, run) == ["finished: False, not True"]

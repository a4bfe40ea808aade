"""2 and 4 processes under a real torchrun compute what one computes on the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
import torch

HERE = Path(__file__).parent
SAME = ["float32", "float64", "accumulated", "clipped", "weighted", "own_sampler", "unused", "false"]
# Those that name no strategy of their own.
SHARDED = SAME[:6]
SEVERAL = ["sent", "normed"]
Results = dict[str, list[dict[str, Any]]]


def results(folder: Path, processes: int, scenarios: list[str], strategy: str = "ddp") -> Results:
    """By scenario what each process has computed; one start of Python for all of them."""
    folder = folder / strategy
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / "equality.py"), strategy]
    command += [str(Path(engine.__file__).parents[1]), str(HERE), ",".join(scenarios)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [json.loads((folder / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    return results(folder, 1, SAME)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def several(request: pytest.FixtureRequest, folder: Path) -> Results:
    return results(folder, request.param, SAME + SEVERAL)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def sharded(request: pytest.FixtureRequest, folder: Path) -> Results:
    return results(folder, request.param, SHARDED, "fsdp")


def as_in_one_process(name: str, one: Results, processes: list[dict[str, Any]]) -> None:
    """Check losses and weights."""
    [single] = one[name]
    tolerance = 1e-12 if name == "float64" else 1e-6
    assert len(single["losses"]) >= 4
    assert len(set(single["losses"])) == len(single["losses"])
    for process in processes:
        assert process["losses"] == pytest.approx(single["losses"], rel=0, abs=tolerance)
        assert [*process["weights"]] == [*single["weights"]]
        for parameter, values in single["weights"].items():
            found, expected = (torch.tensor(v, dtype=torch.float64) for v in (process["weights"][parameter], values))
            assert (found - expected).abs().max() <= tolerance, parameter


def counted_exactly(name: str, one: Results, processes: list[dict[str, Any]]) -> None:
    """Check metrics of 7 samples in validation, and of 13 in a test."""
    [single] = one[name]
    for process in processes:
        for stage, size in (("validation", 7), ("test", 13)):
            assert process[stage] == single[stage]
            assert sum(process[stage]["counts"][:4]) == size == sum(map(sum, process[stage]["confusion"]))
        assert process["values"]["samples"] == 7 and process["tested"]["samples"] == 13
        assert process["values"] == pytest.approx(single["values"], rel=0, abs=1e-6)
        assert process["tested"] == pytest.approx(single["tested"], rel=0, abs=1e-6)


@pytest.mark.parametrize("name", SAME)
def test_losses_and_weights_are_those_of_one_process(name: str, one: Results, several: Results) -> None:
    as_in_one_process(name, one, several[name])


@pytest.mark.parametrize("name", SAME)
def test_sets_that_do_not_divide_evenly_are_counted_exactly(name: str, one: Results, several: Results) -> None:
    counted_exactly(name, one, several[name])


@pytest.mark.long
@pytest.mark.parametrize("name", SHARDED)
def test_processes_with_parts_of_the_weights_compute_the_same(name: str, one: Results, sharded: Results) -> None:
    as_in_one_process(name, one, sharded[name])
    counted_exactly(name, one, sharded[name])


def test_gradients_are_sent_after_the_last_batch_of_a_window_only(several: Results) -> None:
    assert [process["batches"] for process in several["sent"]] == [[2, 4]] * len(several["sent"])


def test_running_statistics_are_those_of_the_first_process(several: Results, folder: Path) -> None:
    first, *others = several["normed"]
    assert first["validation"][-1] == pytest.approx(first["expected"], abs=1e-6)
    assert all(process["expected"] != first["expected"] for process in others)
    saved = torch.load(folder / "ddp" / f"normed-{len(others) + 1}.ckpt", weights_only=True)["state_dict"]
    values = [*saved["net.1.running_mean"].tolist(), *saved["net.1.running_var"].tolist()]
    assert values == first["validation"][-1][:-1]


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_all_processes_evaluate_with_the_same_running_statistics(stage: str, several: Results) -> None:
    first, *others = several["normed"]
    for process in others:
        # The last batches: those of the first process may be more.
        assert process[stage][-1] == first[stage][-1]


def test_clipping_and_weights_of_samples_matter(one: Results) -> None:
    # Otherwise the comparison above would say nothing.
    losses = {name: one[name][0]["losses"] for name in SAME}
    assert losses["clipped"][2:] != pytest.approx(losses["float32"][2:], abs=1e-3)
    assert losses["weighted"] != pytest.approx(losses["float32"][: len(losses["weighted"])], abs=1e-3)

"""Kill two processes under a real torchrun, one of them, or torchrun itself; go on with two, one and four."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import engine
import pytest
from injection import alive

HERE = Path(__file__).parent
SIZE, EPOCHS, STEPS = 46, 6, 36
SECONDS = 400


@contextmanager
def started(folder: Path, number: int, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A start of the run in `folder`, which is over at the end of the block."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), str(HERE / "killed.py")]
    command += [str(Path(engine.__file__).parents[1]), str(HERE), str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"output-{number}.txt", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in pids(folder, number):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def pids(folder: Path, number: int) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.glob(f"pid-{number}-*.json"))]


def lines(folder: Path, number: int) -> list[list[Any]]:
    """[epoch, batches done in all, samples] of what each process was given in a start."""
    texts = [file.read_text() for file in sorted(folder.glob(f"taken-{number}-*.json"))]
    # A line that was not finished when its process was killed is of a batch that was not trained on.
    return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill(folder: Path, number: int, processes: int, victim: str, chance: random.Random) -> None:
    """Start, and kill `victim` at a random moment, once some steps are done; returns when all have ended."""
    with started(folder, number, processes) as launcher:
        end, steps = time.monotonic() + SECONDS, chance.randint(3, 9)
        while len({batch for _, batch, _ in lines(folder, number)}) < steps:
            output = (folder / f"output-{number}.txt").read_text()
            assert launcher.poll() is None and time.monotonic() < end, output
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.06))
        ranks = pids(folder, number)
        assert len(ranks) == processes
        for pid in {"one": [chance.choice(ranks)], "all": ranks, "launcher": [launcher.pid]}[victim]:
            os.kill(pid, signal.SIGKILL)
        assert launcher.wait(60) != 0
        # Without their launcher processes may go on for some steps, and not to the end of the run.
        end = time.monotonic() + (0.3 if victim == "launcher" else SECONDS)
        while any(map(alive, ranks)) and time.monotonic() < end:
            time.sleep(0.01)


def finish(folder: Path, number: int, processes: int) -> list[dict[str, Any]]:
    """Start, and let it come to its end; what each process has written then."""
    with started(folder, number, processes) as launcher:
        code = launcher.wait(SECONDS)
    assert code == 0, (folder / f"output-{number}.txt").read_text()[-3000:]
    return [json.loads((folder / f"result-{number}-{rank}.json").read_text()) for rank in range(processes)]


def check_samples(folder: Path, processes: list[int]) -> None:
    """Of the steps that count, no sample comes twice in an epoch, and none is missing but the uneven tail.

    Args:
        folder: Of the run.
        processes: How many each start had.
    """
    # Of a start those batches count that came before the checkpoint from which the next one went on.
    begun = []
    for number, count in enumerate(processes):
        began = [json.loads(file.read_text()) for file in sorted(folder.glob(f"began-{number}-*.json"))]
        assert len(began) == count and len(set(began)) == 1
        begun.append(began[0])
    assert begun[0] == 0 and begun == sorted(begun)
    ends = [*begun[1:], STEPS]
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(EPOCHS)}
    left_out = dict.fromkeys(seen, 0)
    counted = []
    for number, count in enumerate(processes):
        kept = [line for line in lines(folder, number) if line[1] < ends[number]]
        counted += sorted({batch for _, batch, _ in kept})
        for epoch in sorted({epoch for epoch, *_ in kept}):
            left_out[epoch] = (SIZE - len(seen[epoch])) % count
            seen[epoch] += [sample for of_epoch, _, samples in kept if of_epoch == epoch for sample in samples]
    assert counted == [*range(STEPS)]
    for epoch, samples in seen.items():
        assert len(samples) == len(set(samples)) == SIZE - left_out[epoch], (epoch, sorted(samples))
        assert set(samples) <= set(range(SIZE))
    print(f"\nprocesses {processes}, first batches {begun}, left out {list(left_out.values())}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes come to that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    results = finish(folder, 0, 2)
    check_samples(folder, [2])
    assert results[0] == results[1]
    return results


def dice() -> random.Random:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes of which first one was killed, then both, then their launcher."""
    folder, chance = tmp_path_factory.mktemp("killed"), dice()
    for number, victim in enumerate(["one", "all", "launcher"]):
        kill(folder, number, 2, victim, chance)
    return folder


LONG = pytest.mark.long


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=LONG), pytest.param(4, marks=LONG)])
def test_after_every_kind_of_kill_a_run_goes_on(
    killed: Path, whole: list[dict[str, Any]], processes: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    results = finish(folder, 3, processes)
    check_samples(folder, [2, 2, 2, processes])
    for result in results:
        if processes == 2:
            assert result == whole[0]
        elif processes == 1:
            assert result["weights"] == pytest.approx(whole[0]["weights"], rel=0, abs=1e-6)
            assert result["metrics"] == pytest.approx(whole[0]["metrics"], rel=0, abs=1e-5)
        else:
            # Of every epoch that they finish, they leave out two samples.
            assert result["weights"] == results[0]["weights"]


@LONG
def test_a_run_that_is_killed_goes_on_with_any_number_each_time(tmp_path: Path) -> None:
    chance = dice()
    for number, (processes, victim) in enumerate([(4, "one"), (1, "all"), (2, "launcher")]):
        kill(tmp_path, number, processes, victim, chance)
    results = finish(tmp_path, 3, 4)
    check_samples(tmp_path, [4, 1, 2, 4])
    assert all(result == results[0] for result in results)

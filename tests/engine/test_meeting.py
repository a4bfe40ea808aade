"""How processes of a run find each other, and what they are told where they cannot or must not go on together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import distributed
from engine.strategies import select_device
from injection import launched
from test_failures_of_one import HERE, PATHS, PATIENCE, rank
from torch import nn
from toy import Net, loader, trainer

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def unequal() -> dict[str, Callable[[], Any]]:
    """Runs with something that differs in the second process."""
    odd = rank() == 1
    frozen, wider, longer = Net(), Net(), Net()
    frozen.net.requires_grad_(not odd)
    wider.net = nn.Linear(3, 1 + odd)
    if odd:
        longer.extra = nn.Linear(1, 1)
    both = {"max_epochs": 1 + odd, "accumulate_grad_batches": 2 + odd}
    return {
        "trainer": lambda: trainer(**both).fit(Net(), loader()),
        "precision": lambda: trainer(precision="bf16-mixed" if odd else "32-true").validate(Net(), loader()),
        "hparams": lambda: trainer().fit(Net(lr=0.1 + odd), loader()),
        "frozen": lambda: trainer().fit(frozen, loader()),
        "shape": lambda: trainer().test(wider, loader()),
        "missing": lambda: trainer().predict(longer, loader()),
        "stage": lambda: (trainer().fit if odd else trainer().test)(Net(), loader()),
    }


def tell_what_differs() -> None:
    for name, work in unequal().items():
        with pytest.raises(engine.MisconfigurationException) as caught:
            work()
        Path(f"{name}-{rank()}").write_text(str(caught.value))
    # These may differ, and a run is possible after those that were refused.
    engine.seed_everything(rank())
    own = {"default_root_dir": f"root{rank()}", "enable_progress_bar": rank() == 0, "devices": "auto" if rank() else 2}
    trainer(**own).fit(Net(), loader())


DIFFERENCES = {
    "trainer": "max_epochs (Trainer) is 1 on rank 0, 2 on rank 1; accumulate_grad_batches (Trainer) is 2 on rank 0",
    "precision": "precision (Trainer) is '32-true' on rank 0, 'bf16-mixed' on rank 1",
    "hparams": "lr (Net) is 0.1 on rank 0, 1.1 on rank 1",
    "frozen": "parameter net.weight is trained, shape (1, 3) on rank 0, frozen, shape (1, 3) on rank 1",
    "shape": "parameter net.weight is trained, shape (1, 3) on rank 0, trained, shape (2, 3) on rank 1",
    "missing": "parameter extra.weight is missing on rank 0, trained, shape (1, 1) on rank 1",
    "stage": "the stage is test on rank 0, fit on rank 1",
}


def test_processes_that_were_told_different_things_all_say_what_differs() -> None:
    child = launched(tell_what_differs)
    assert child.end() == 0, child.err
    for name, text in DIFFERENCES.items():
        told = [Path(f"{name}-{number}").read_text() for number in range(2)]
        assert text in told[0] and told[0] == told[1] and "\n" not in told[0]


ENVIRONMENTS = [
    ({"RANK": "1"}, "the environment has RANK, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with torchrun"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "has WORLD_SIZE, MASTER_ADDR, but no RANK, MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "but no MASTER_PORT"),
    ({"RANK": "two", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK='two' in the environment is"),
    ({"RANK": "0", "WORLD_SIZE": "1.5", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "WORLD_SIZE='1.5' in the"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK=2, but WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
]


@pytest.mark.parametrize(("variables", "message"), ENVIRONMENTS, ids=str)
def test_an_incomplete_environment_is_refused_with_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(engine.MisconfigurationException, match=re.escape(message)) as caught:
        trainer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("nccl", "backend 'nccl' is for GPUs, and this runs on cpu; give gloo"),
        ("cpu:gloo,cuda:nccl", "is for GPUs"),
        ("carrier-pigeon", "this torch has no carrier-pigeon, but gloo"),
    ],
)
def test_a_backend_that_cannot_work_is_refused(backend: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(engine.MisconfigurationException, match=re.escape(message)):
        distributed.init(torch.device("cpu"), backend)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for accelerator in ("gpu", "cuda", "auto"):
        with pytest.raises(engine.MisconfigurationException, match="4 processes on this machine, which has 2 GPUs"):
            select_device(accelerator, "auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("gpu", "auto") == torch.device("cuda", 1)


# By hand, as srun starts processes


@pytest.fixture
def port() -> Iterator[int]:
    """A port that another program listens at, which never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def by_hand(what: str, ranks: list[int], port: int) -> dict[int, tuple[int, str]]:
    """Exit code and error stream of each rank of two that is started."""
    command = [sys.executable, str(HERE / "one_of_several.py"), what, *PATHS]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = {
        rank: subprocess.Popen(
            command, env={**os.environ, **variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in ranks
    }
    try:
        return {
            rank: (p.returncode, err) for rank, p in processes.items() for _, err in [p.communicate(timeout=PATIENCE)]
        }
    finally:
        for process in processes.values():
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.long
def test_a_port_in_use_is_told_in_one_line_and_nobody_hangs(port: int) -> None:
    ended = by_hand("join soon", [0, 1], port)
    assert [code for code, _ in ended.values()] == [1, 1]
    message = f"port {port} is in use by another program; export another MASTER_PORT"
    assert message in ended[0][1].splitlines()[-1]
    assert f"do not meet at 127.0.0.1:{port}, where another program may listen" in ended[1][1]


@pytest.mark.long
def test_where_nobody_answers_one_waits_for_a_while_and_says_so() -> None:
    [(code, err)] = by_hand("join soon", [1], port := free_port()).values()
    assert code == 1 and f"nobody answers at 127.0.0.1:{port}" in err.splitlines()[-1]
    assert "[c10d]" not in err


@pytest.mark.long
def test_the_first_process_waits_for_a_while_for_the_others() -> None:
    [(code, err)] = by_hand("join soon", [0], free_port()).values()
    assert code == 1 and "not all processes of the run have started" in err


def test_processes_that_are_started_by_hand_meet_without_a_word() -> None:
    ended = by_hand("join", [0, 1], free_port())
    assert [code for code, _ in ended.values()] == [0, 0]
    assert [err for _, err in ended.values()] == ["", ""]

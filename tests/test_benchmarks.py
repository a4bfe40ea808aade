"""The benchmarks run, what they print has its form, and nobody wins by doing less."""

from __future__ import annotations

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("contenders", "environments", "run", "step", "epoch", "tables", "turns", "work", "epochs", "mnist", "figure")
NAMES += ("start", "alternating", "contender")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, which import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name)


@pytest.mark.long
def test_a_quick_run_prints_and_writes_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick"]
    environment = {**os.environ, "BENCH_RESULTS": str(tmp_path)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    by_key = {table["key"]: {row["name"]: row for row in table["rows"]} for part in ("step", "epoch", "start", "scale")
              for table in results[part]}  # fmt: skip
    quiet, realistic = by_key["step/tiny/quiet"], by_key["step/tiny/realistic"]
    assert list(quiet) == ["bare loop", "this Trainer"]
    assert list(realistic) == ["bare loop", "bare loop, realistic", "this Trainer"]
    for table, limit in ((quiet, 1.05), (realistic, 1.1)):
        bare, ours = table["bare loop"], table["this Trainer"]
        # By hand against by hand. What both of them have done is compared in the race; this one is short.
        assert bare["value"] > 0 and bare["goal"] == "" and bare["met"] is None
        # What is met is what was measured, however busy the machine is.
        assert ours["goal"] == f"≤ {limit:g}" and ours["met"] is (ours["value"] <= limit)
    calls = {name: int(row["cells"]["calls"]) for name, row in quiet.items()}
    # Reading a DataLoader takes the loop by hand more calls than the engine adds to a step.
    assert 50 < calls["this Trainer"] <= calls["bare loop"] < 200
    assert [row["cells"]["frames"] for row in quiet.values()] == ["0", "6"]
    own = "this Trainer, with a sampler of one's own"
    assert list(by_key["epoch/digits"]) == ["bare loop", "this Trainer", own, "generated project"]
    assert {row["goal"] for row in by_key["epoch/digits"].values()} == {""}
    first = by_key["start/first step"]
    assert list(first) == ["bare loop", "this Trainer", "python main.py"]
    assert all(int(row["cells"]["peak memory"].split()[0].replace(",", "")) > 50 for row in first.values())
    growth = [row["name"] for table in results["scale"] if table["key"] == "scale/growth" for row in table["rows"]]
    assert len(growth) == 12 and len(set(growth)) == 6
    assert {row["goal"] != "" for row in by_key["scale/memory"].values()} == {True}
    # The page has all of it, and the plot is a picture.
    page = (tmp_path / "results.md").read_text()
    assert page.count("| this Trainer |") == 4 and "≤ 1.05" in page
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert "this Trainer" in out.stdout and "torch 2" in out.stdout


LAZY = '''
from torch import nn

def train(work):
    """Leaves out every other step."""
    optimizer = work.optimizer(work.net.parameters())
    for number, (images, labels) in enumerate(work.batches):
        loss = nn.functional.cross_entropy(work.net(images), labels)
        if number % 2:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
'''


@pytest.mark.long
def test_who_does_less_is_refused(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chosen = [bench.contenders.CONTENDERS[0], bench.contenders.Contender("lazy", "lazy", "torch")]
    with pytest.raises(RuntimeError, match="lazy ended with other weights than the bare loop"):
        bench.step.table("tiny", "quiet", chosen, bench.step.Race(1.05, 1, 1, 20, 2), counting=False)


def test_epochs_of_less_are_refused(bench: SimpleNamespace) -> None:
    done = {"steps": 20, "trained": 1000, "validated": 300, "order": 1234, "accuracy": 0.9}
    done |= {f"hand_{name}": done[name] for name in ("steps", "trained", "validated", "order")}
    racing = [SimpleNamespace(name=name, end={**done, **other}) for name, other in (("bare", {}), ("other", {}))]
    bench.epoch.check_same_work(racing)
    for less in (
        {"steps": 19},
        {"trained": 999},
        {"validated": 0},
        {"order": 0},
        {"accuracy": 0.5},
        {"hand_steps": 19},
        {"hand_order": 0},
    ):
        racing[1].end = {**done, **less}
        with pytest.raises(RuntimeError, match=f"other has not done the same work.*{[*less][0]}"):
            bench.epoch.check_same_work(racing)


def test_a_contender_that_fails_is_named_with_what_it_said(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def train(work):\n    raise ValueError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = bench.contenders.Contender("broken", "broken", "torch")
    opened = len(os.listdir("/dev/fd"))
    with pytest.raises(RuntimeError, match="(?s)broken: ended.*no such thing"):
        with bench.turns.racers([(broken, ["--blocks", "1", "--steps", "5"])], "steps"):
            pass
    # Neither its terminal nor its socket is left.
    assert len(os.listdir("/dev/fd")) == opened


def test_the_fastest_peer_is_neither_ours_nor_by_hand(bench: SimpleNamespace) -> None:
    lap = bench.turns.Lap
    times = {"bare loop": 1.0, "this Trainer": 1.2, "generated project": 1.1, "Ignite": 2.0, "Fabric": 3.0}
    # The process of Ignite is twice as slow as that of the others, and so is the loop by hand in it.
    slow = {name: 2 if name == "Ignite" else 1 for name in times}
    laps = {name: [lap(*[time * slow[name]] * 2, *[slow[name]] * 2)] * 3 for name, time in times.items()}
    racing = [SimpleNamespace(name=name, laps=own) for name, own in laps.items()]
    table = bench.tables.Table("an epoch")
    bench.step.add_fastest_peer(table, racing, "cpu")
    [row] = table.rows
    assert (row.name, row.value, row.met) == ("this Trainer / fastest peer (Ignite)", 0.6, True)


def test_a_block_costs_a_contender_what_is_its_own(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"cpu": 0, "wall": 0}

    def spend(cpu: int, wall: int) -> None:
        now["cpu"] += cpu
        now["wall"] += wall

    def cpu_time() -> int:
        return now["cpu"]

    clocks = SimpleNamespace(process_time=cpu_time, thread_time=cpu_time, perf_counter=lambda: now["wall"])
    monkeypatch.setattr(bench.contender, "time", clocks)
    ours, theirs = socket.socketpair()
    with ours, ours.makefile() as said:
        ours.sendall(b"go\n" * 3)
        turn = bench.contender.Turn(theirs.detach(), 2)
        turn.by_hand, turn.rest_by_hand = functools.partial(spend, 20, 30), functools.partial(spend, 1, 2)
        turn.warm_up = functools.partial(spend, 1000, 1000)
        turn.border()
        for _ in range(2):
            spend(5, 7)
            turn.between()
            spend(5, 7)
            turn.border()
        _, *laps = [json.loads(said.readline()) for _ in range(3)]
    assert laps == [{"cpu": 10, "wall": 14, "hand_cpu": 41, "hand_wall": 62}] * 2


def test_the_loop_by_hand_goes_before_each_block(bench: SimpleNamespace) -> None:
    done: list[str] = []
    turns = bench.alternating.Alternation(lambda: done.append("by hand"), 2, iter(range(1000)).__next__)
    for _ in range(6):
        turns.tick()
        done.append("step")
    assert done == ["by hand", "step", "step"] * 3
    assert turns.laps == [(1, 1)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's memory never was its parent's")
def test_the_memory_of_a_start_is_its_own(bench: SimpleNamespace) -> None:
    start, name = bench.start.Start, "nothing"
    started = bench.start.measure(start(name, [sys.executable, "-c", "pass"]))
    assert 0 < started.megabytes < 60 and 0 < started.cpu < 10
    bench.start.measure(start(name, [sys.executable, "-c", "raise SystemExit(17)"], 17))
    with pytest.raises(RuntimeError, match="(?s)nothing: ended otherwise.*ZeroDivisionError"):
        bench.start.measure(start(name, [sys.executable, "-c", "1 / 0"]))


def test_images_one_by_one_are_those_of_the_others(bench: SimpleNamespace) -> None:
    subset = importlib.import_module("torch.utils.data").Subset
    assert bench.epochs.places(subset(subset([5, 6, 7, 8], [3, 1, 0]), [2, 0])) == [0, 3]


def test_goals_are_compared_with_what_was_measured(bench: SimpleNamespace, capsys: Any) -> None:
    table = bench.tables.Table("speeds", "who")
    table.add("reference", {"ratio": "1.000"}, 1.0)
    table.add("slow", {"ratio": "1.060"}, 1.06, bench.tables.Goal(1.05))
    table.add("fast", {"ratio": "6.000"}, 6.0, bench.tables.Goal(5, at_least=True))
    assert [row.met for row in table.rows] == [None, False, True]
    lines = table.markdown().splitlines()
    assert lines[2] == "| who | ratio | goal | met |"
    assert lines[5:7] == ["| slow | 1.060 | ≤ 1.05 | ✗ |", "| fast | 6.000 | ≥ 5 | ✓ |"]
    table.show()
    assert "≤ 1.05" in capsys.readouterr().out


def test_what_is_published_stands_between_the_marks(bench: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{bench.run.BEGIN}\nold\n{bench.run.END}\nafter\n")
    bench.run.publish("new \\1", page)
    assert page.read_text() == f"before\n{bench.run.BEGIN}\n\nnew \\1\n{bench.run.END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="error: "):
        bench.run.publish("new", page)
    # The page of this repository can be renewed.
    real = bench.run.PAGE.read_text(encoding="utf-8")
    assert real.count(bench.run.BEGIN) == real.count(bench.run.END) == 1


def test_a_page_says_when_and_where_each_part_was_measured(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.tables, "RESULTS", tmp_path)
    table = bench.tables.Table("a title", key="key")
    table.add("a row", {"figure": "1"}, 1.0)
    monkeypatch.setattr(bench.tables, "commit", lambda: "abc")
    for part in ("step", "loader"):
        bench.tables.record(part, [table])
    common = bench.run.page().split("\n")[0]
    # What all parts agree on is there once.
    assert "torch 2" in common and "commit abc" in common and bench.run.page().count("commit") == 1
    monkeypatch.setattr(bench.tables, "commit", lambda: "def")
    monkeypatch.setattr(sys, "argv", ["loader.py", "--quick"])
    bench.tables.record("loader", [table])
    lines = [line for line in bench.run.page().split("\n") if line and not line.startswith("|")]
    assert "torch 2" in lines[0] and "commit" not in lines[0]
    assert lines[1:] == ["commit abc:", "**a title**", "commit def:", "**a title**"]
    assert bench.tables.was_quick(bench.run.PARTS) == ["loader"]


def test_the_large_set_is_one_that_torchvision_reads(bench: SimpleNamespace, tmp_path: Path) -> None:
    torchvision = importlib.import_module("torchvision")
    bench.mnist.write(tmp_path, {"train": 50, "t10k": 20})
    train, test = (torchvision.datasets.MNIST(tmp_path, train=training) for training in (True, False))
    assert (len(train), len(test)) == (50, 20) and train.data.shape[1:] == (28, 28)
    assert set(train.targets.tolist()) <= set(range(10)) and train.data.float().std() > 30
    again, labels = bench.mnist.images_and_labels(50, test=False)
    assert (train.data.numpy() == again).all() and (train.targets.numpy() == labels).all()

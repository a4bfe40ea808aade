"""Profilers: what they tell of time spent on purpose, and that either engine's Trainer can use them."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import engine
import pytest
import pytorch_lightning
import torch
from engine.profilers import (
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    make_profiler,
)
from torch import nn
from toy import QUIET, Net, loader, trainer

STEP = "[Strategy]SingleDeviceStrategy.training_step"


def work(profiler: Any, steps: int = 3, action: str = STEP) -> None:
    """So many steps, with an action around them and one within them."""
    model = nn.Linear(3, 1)
    for _ in range(steps):
        with profiler.profile("run_training_batch"):
            with profiler.profile("[Callback]Slow.on_train_batch_start"):
                time.sleep(0.002)
            with profiler.profile(action):
                model(torch.ones(2, 3)).sum().backward()


def table(text: str) -> dict[str, list[str]]:
    """The rows of a summary, by action."""
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()[1:] if line]
    return {row[0]: row[1:] for row in rows}


def test_the_simple_profiler_sums_up_by_action(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = SimpleProfiler()
    profiler.setup("fit")
    work(profiler, 4)
    profiler.describe()
    printed = capsys.readouterr().out
    assert printed.startswith("FIT Profiler Report\n")
    rows = table(printed)
    assert rows["Action"] == ["Mean duration (s)", "Total time (s)", "Num calls", "Percentage %"]
    mean, total, calls, share = rows["[Callback]Slow.on_train_batch_start"]
    assert float(mean) >= 0.002 and float(total) >= 0.008 and calls == "4" and 0 < float(share) <= 100
    assert float(rows["run_training_batch"][1]) >= float(total)
    assert rows["Total"][1:] == ["12", "100.0"]
    assert list(rows)[2] == "run_training_batch", "the longest comes first"
    assert {name: len(times) for name, times in profiler.recorded_durations.items()} == dict.fromkeys(
        ["run_training_batch", "[Callback]Slow.on_train_batch_start", STEP], 4
    )


def test_the_short_table_tells_times_only() -> None:
    profiler = SimpleProfiler(extended=False)
    work(profiler)
    assert profiler.summary().startswith("Profiler Report\n")
    assert all(len(row) == 2 for row in table(profiler.summary()).values())
    assert "Total" not in table(profiler.summary())


def test_a_table_on_a_terminal_is_the_same_in_color(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    profiler = SimpleProfiler()
    work(profiler)
    profiler.describe()
    printed = capsys.readouterr().out
    assert "\x1b[1m" in printed
    assert set(table(re.sub(r"\x1b\[[\d;]*m", "", printed))) == set(table(profiler.summary()))


@pytest.mark.parametrize("rank", [None, 1])
def test_a_report_goes_to_a_file_of_the_run(rank: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = SimpleProfiler(filename="times/of it")
    for stage in ("fit", "test", "test"):
        profiler.setup(stage, rank, "logs/run")
        work(profiler, 1)
        profiler.describe()
    assert capsys.readouterr().out == ""
    end = "" if rank is None else f"-{rank}"
    assert {file.name for file in Path("logs/run").iterdir()} == {f"{s}-times_of_it{end}.txt" for s in ("fit", "test")}
    assert Path(f"logs/run/test-times_of_it{end}.txt").read_text().count("TEST Profiler Report") == 2


def test_other_processes_than_the_first_print_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    profiler = SimpleProfiler()
    work(profiler)
    profiler.describe()
    assert capsys.readouterr().out == ""


def test_an_action_that_raises_is_recorded() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(ZeroDivisionError), profiler.profile("a"):
        _ = 1 / 0
    assert len(profiler.recorded_durations["a"]) == 1 and not profiler.current_actions


def test_what_was_not_started_cannot_be_stopped_nor_started_twice() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(engine.MisconfigurationException, match="'a' was never started"):
        profiler.stop("a")
    profiler.start("a")
    with pytest.raises(engine.MisconfigurationException, match="'a' was started twice"):
        profiler.start("a")


class Counting(Profiler):
    """A user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.stages: list[Any] = []

    def start(self, action_name: str) -> None:
        self.counts[action_name] += 1

    def stop(self, action_name: str) -> None: ...

    def summary(self) -> str:
        return f"{self.counts.total()} actions"

    def teardown(self, stage: str | None) -> None:
        self.stages.append(stage)
        super().teardown(stage)


def test_a_profiler_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Counting()
    profiler.setup("fit")
    work(profiler)
    profiler.describe()
    assert capsys.readouterr().out == "9 actions\n" and profiler.stages == ["fit"]
    with pytest.raises(NotImplementedError):
        Profiler().start("a")


def traces(folder: str) -> list[list[dict[str, Any]]]:
    """The events of every trace in a folder."""
    files = sorted(Path(folder).glob("*.pt.trace.json"))
    return [json.loads(file.read_text())["traceEvents"] for file in files]


def names(events: list[dict[str, Any]]) -> Counter[str]:
    return Counter(event["name"] for event in events if event.get("ph") == "X")


def test_the_pytorch_profiler_writes_a_trace_of_three_steps(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = PyTorchProfiler(filename="torch", row_limit=-1, record_shapes=True, group_by_input_shapes=True)
    profiler.setup("fit", None, "logs")
    with profiler.profile("[LightningModule]Net.on_train_start"):
        work(profiler, 2, "[Strategy]SingleDeviceStrategy.validation_step")
    work(profiler, 9)
    profiler.describe()
    (events,) = traces("logs")
    found = names(events)
    assert found[f"[pl][profile]{STEP}"] == 3 and found["aten::linear"] == 3
    assert found["[pl][profile][Callback]Slow.on_train_batch_start"] == 3
    assert [file.name.split(".")[0] for file in Path("logs").glob("*.json")] == ["fit-torch"]
    report = Path("logs/fit-torch.txt").read_text()
    assert report.startswith("FIT Profiler Report") and "aten::linear" in report and "[2, 3]" in report
    assert capsys.readouterr().out == ""


def test_a_schedule_and_other_arguments_are_those_of_torch() -> None:
    ready: list[int] = []
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=2)
    profiler = PyTorchProfiler("logs", schedule=schedule, on_trace_ready=lambda p: ready.append(p.step_num))
    profiler.setup("test")
    work(profiler, 9, "x.test_step")
    assert "Profiler Report" in profiler.summary() and ready == [3, 6] and not Path("logs").exists()
    profiler.teardown("test")
    silent = PyTorchProfiler("logs", export_to_chrome=False, table_kwargs={"max_name_column_width": 9})
    work(silent, 9)
    silent.describe()
    assert not Path("logs").exists()


def test_a_stage_of_few_batches_is_recorded_as_a_whole() -> None:
    model = Net()
    trainer(limit_train_batches=2).fit(model, loader())
    profiler = PyTorchProfiler("logs")
    profiler._lightning_module = model
    profiler.setup("fit")
    for _ in range(2):
        with profiler.profile(STEP):
            model(torch.ones(2, 3))
    profiler.describe()
    (events,) = traces("logs")
    assert names(events)[f"[pl][profile]{STEP}"] == 2
    assert names(events)["[pl][module]torch.nn.modules.linear.Linear: net"] == 2
    assert not model.net._forward_hooks and not model.net._forward_pre_hooks


def test_a_stage_that_ends_before_the_schedule_begins_says_so() -> None:
    profiler = PyTorchProfiler("logs")
    profiler.setup("fit")
    work(profiler, 1)
    with pytest.warns(UserWarning, match="over before its schedule came to record"):
        profiler.describe()
    profiler.setup("fit")
    work(profiler, 6)
    profiler.describe()
    assert len(traces("logs")) == 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"emit_nvtx": True}, r"emit_nvtx=\.\.\.\): torch.profiler has activities"),
        ({"sort_by_key": "time"}, "sort_by_key='time'; give one of count"),
        ({"schedule": 3}, r"schedule=3; give one of torch.profiler.schedule"),
        ({"schedule": lambda step: step}, "give one of torch.profiler.schedule"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match=fault):
        PyTorchProfiler(**options)


def test_what_the_argument_of_the_trainer_stands_for() -> None:
    kinds = {"simple": SimpleProfiler, "PyTorch": PyTorchProfiler, "pytorch": PyTorchProfiler}
    assert all(type(make_profiler(name)) is kind for name, kind in kinds.items())
    for given in (None, own := Counting(), PassThroughProfiler(), pytorch_lightning.profilers.SimpleProfiler()):
        assert make_profiler(given) is given
    assert make_profiler(own) is own
    for wrong in ("advanced", True, object(), SimpleProfiler):
        with pytest.raises(engine.MisconfigurationException, match="give simple, pytorch, or a Profiler"):
            make_profiler(wrong)


both = pytest.mark.parametrize(
    "pl", [pytest.param(engine, id="engine"), pytest.param(pytorch_lightning, id="lightning")]
)


def fitted(pl: Any, profiler: Profiler) -> None:
    """A run of 8 steps on either engine, with an action of the user's own in each."""

    class Steps(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with self.trainer.profiler.profile("my own"):
                return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def on_train_epoch_end(self) -> None:
            time.sleep(0.001)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Looks(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, *args: Any) -> None: ...

    run = pl.Trainer(**{**QUIET, "profiler": profiler, "callbacks": Looks(), "default_root_dir": "logs"})
    run.fit(Steps(), loader(16))
    assert run.profiler is profiler


@both
def test_either_trainer_has_its_actions_timed(pl: Any) -> None:
    profiler = SimpleProfiler()
    fitted(pl, profiler)
    calls = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert calls["my own"] == 8 and calls["[LightningModule]Steps.on_train_epoch_end"] == 1
    for end in ("Looks.on_train_batch_start", ".training_step", "train_dataloader_next"):
        assert next(calls[name] for name in calls if name.endswith(end)) in (8, 9)


@both
@pytest.mark.parametrize("kind", [SimpleProfiler, PyTorchProfiler])
def test_either_trainer_has_the_report_written(pl: Any, kind: type[Any]) -> None:
    fitted(pl, kind(filename="f"))
    report = Path("logs/fit-f.txt").read_text()
    assert report.count("FIT Profiler Report") == 1 and "my own" in report
    counts = [names(events)["[pl][profile]my own"] for events in traces("logs")]
    assert counts == ([3] if kind is PyTorchProfiler else [])


@both
def test_either_trainer_can_use_a_profiler_of_ones_own(pl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(pl, profiler := Counting())
    assert profiler.counts["my own"] == 8 and profiler.counts.total() > 50
    assert capsys.readouterr().out.splitlines()[-1].endswith(" actions") and profiler.stages == ["fit"]
    fitted(pl, PassThroughProfiler())

"""Stopping from outside, with real signals: the step is finished, the state saved, and resuming changes no bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine.callbacks import ModelCheckpoint
from engine.loggers import CSVLogger
from injection import Acts, Apart, at, time_limit
from test_resume import Deep, assert_same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from toy import Net, Steps, dataset, loader, trainer

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
EPOCHS = 3


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Handlers as a program starts with them; a shell starts what is in the background with Ctrl-C ignored."""
    before = {number: signal.getsignal(number) for number in (TERM, USR1, INT)}
    signal.signal(TERM, signal.SIG_DFL)
    signal.signal(USR1, signal.SIG_DFL)
    signal.signal(INT, signal.default_int_handler)
    with time_limit():
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def never() -> Acts:
    return at("on_train_batch_start", 0, print)


def train(folder: str, acts: Acts | None = None, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Train in a folder; returns the whole state at the end, and the text of metrics.csv as "csv"."""
    engine.seed_everything(5 if ckpt_path is None else 99)
    saver = ModelCheckpoint(f"{folder}/c", filename="best", monitor="val_loss", save_last=True)
    run = trainer(
        callbacks=[acts or never(), saver],
        enable_checkpointing=True,
        logger=CSVLogger(".", folder, "logs"),
        log_every_n_steps=2,
        **{"max_epochs": EPOCHS, "num_sanity_val_steps": 1, **options},
    )
    run.fit(Deep(), loader(10, shuffle=True), loader(6), ckpt_path=ckpt_path)
    run.save_checkpoint(f"{folder}/end.ckpt")
    end = torch.load(f"{folder}/end.ckpt", weights_only=True)
    return {**end, "csv": Path(folder, "logs/metrics.csv").read_text()}


def exit_of(folder: str, acts: Acts, **options: Any) -> int:
    """The exit code of a run that is stopped; that of a shell after Ctrl-C for KeyboardInterrupt."""
    try:
        train(folder, acts, **options)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    except KeyboardInterrupt:
        return 130
    return 0


def send(*numbers: int) -> Any:
    return lambda trainer: [signal.raise_signal(number) for number in numbers]


MOMENTS: list[tuple[str, int, dict[str, Any]]] = [
    ("setup", 1, {}),
    ("on_fit_start", 1, {}),
    ("on_train_start", 1, {}),
    ("on_train_epoch_start", 2, {}),
    ("on_train_batch_start", 1, {}),
    ("on_before_optimizer_step", 7, {}),
    ("on_train_batch_end", 3, {}),
    ("on_train_batch_end", 5, {}),
    ("on_train_batch_start", 3, {"accumulate_grad_batches": 2}),
    ("on_train_batch_end", 6, {"accumulate_grad_batches": 4}),
    ("on_validation_start", 2, {}),
    ("on_validation_batch_start", 2, {}),
    ("on_validation_batch_end", 6, {}),
    ("on_validation_epoch_end", 2, {}),
    ("on_train_epoch_end", 1, {}),
    ("on_save_checkpoint", 2, {}),
    ("on_save_checkpoint", 2, {"async_save": True}),
    ("on_train_batch_start", 15, {}),
    ("on_validation_batch_end", 9, {}),
    ("on_train_epoch_end", 3, {}),
]


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 143), (INT, 130)], ids=["TERM", "USR1", "INT"])
@pytest.mark.parametrize(("hook", "when", "options"), MOMENTS, ids=str)
def test_a_signal_at_any_moment_saves_a_step_from_which_no_bit_changes(
    number: int, code: int, hook: str, when: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("run", **options)
    for file in Path("run").rglob("*.*"):
        file.unlink()
    assert exit_of("run", at(hook, when, send(number)), **options) == code
    assert f"{ {TERM: 'SIGTERM', USR1: 'SIGUSR1', INT: 'Ctrl-C'}[number] }: stopped after" in capsys.readouterr().out
    last = torch.load("run/c/last.ckpt", weights_only=True)
    assert not any(last["gradients"]), "saved within a window of accumulated gradients"
    assert not [*Path("run").rglob("*.tmp")]
    # Everything of the step is finished.
    assert not last["state"]["step_open"]
    resumed = train("run", None, "run/c/last.ckpt", **options)
    assert_same(whole, resumed)


LATE = ["on_train_end", "on_fit_end", "teardown"]


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 143), (INT, 130)], ids=["TERM", "USR1", "INT"])
@pytest.mark.parametrize("hook", LATE)
def test_a_signal_after_the_last_step_is_not_lost(number: int, code: int, hook: str) -> None:
    assert exit_of("run", at(hook, 1, send(number))) == code


def test_a_signal_while_a_finished_run_is_resumed_is_not_lost() -> None:
    train("run")
    assert exit_of("run", at("on_fit_start", 1, send(TERM)), ckpt_path="run/c/last.ckpt") == 143


@pytest.mark.parametrize(
    ("numbers", "code", "name"),
    [((TERM, INT), 130, "Ctrl-C"), ((INT, TERM), 130, "Ctrl-C"), ((USR1, TERM, TERM), 143, "SIGTERM")],
)
def test_of_several_signals_the_most_urgent_counts(
    numbers: tuple[int, ...], code: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of("run", at("on_train_batch_start", 2, send(*numbers))) == code
    assert f"{name}: stopped after 2 steps" in capsys.readouterr().out


def test_teardown_runs_and_loggers_end_after_a_signal() -> None:
    seen: list[str] = []

    class Watch(engine.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(type(exception).__name__)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            seen.append(stage)

    with pytest.raises(SystemExit):
        trainer(callbacks=[Watch(), at("on_train_batch_end", 1, send(TERM))]).fit(Net(), loader())
    assert seen == ["SystemExit", "fit"]


@pytest.mark.parametrize("end", ["success", "error", "signal"])
def test_handlers_are_put_back(end: str) -> None:
    inside: list[Any] = []

    def act(run: engine.Trainer) -> None:
        inside.extend(signal.getsignal(number) for number in (TERM, USR1, INT))
        if end == "error":
            raise ZeroDivisionError
        if end == "signal":
            signal.raise_signal(TERM)

    before = [signal.getsignal(number) for number in (TERM, USR1, INT)]
    try:
        trainer(callbacks=at("on_train_batch_start", 1, act)).fit(Net(), loader())
    except (ZeroDivisionError, SystemExit):
        assert end != "success"
    assert len(inside) == 3 and not set(map(id, inside)) & set(map(id, before))
    assert [signal.getsignal(number) for number in (TERM, USR1, INT)] == before


def test_a_programs_own_handler_is_left_alone() -> None:
    calls: list[int] = []
    signal.signal(TERM, lambda number, frame: calls.append(number))
    signal.signal(INT, signal.SIG_IGN)
    run = trainer(callbacks=at("on_train_batch_start", 2, send(TERM, INT)))
    run.fit(Net(), loader())
    assert calls == [TERM] and run.global_step == 4
    assert signal.getsignal(INT) == signal.SIG_IGN


def test_fit_works_in_a_thread() -> None:
    run = trainer()
    thread = threading.Thread(target=run.fit, args=(Net(), loader()))
    thread.start()
    thread.join()
    assert run.global_step == 4 and signal.getsignal(TERM) == signal.SIG_DFL


def test_outside_of_fit_signals_are_pythons() -> None:
    model = Steps(validation=lambda module, batch, batch_idx: signal.raise_signal(INT))
    with pytest.raises(KeyboardInterrupt):
        trainer().validate(model, loader())
    assert model.count("val") == 1


def test_without_checkpoints_a_signal_says_that_nothing_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(callbacks=at("on_train_batch_end", 1, send(TERM))).fit(Net(), loader())
    assert "stopped after 1 steps; nothing was saved" in capsys.readouterr().out


# A second Ctrl-C


def test_a_second_ctrl_c_aborts_at_once_and_the_last_checkpoint_stands() -> None:
    whole = train("whole")
    reached: list[str] = []

    def twice(run: engine.Trainer) -> None:
        signal.raise_signal(INT)
        reached.append("first")
        signal.raise_signal(INT)
        reached.append("second")

    acts = at("on_before_optimizer_step", 8, twice)
    assert exit_of("run", acts) == 130
    assert reached == ["first"]
    assert torch.load("run/c/last.ckpt", weights_only=True)["global_step"] == 5
    assert_same({**whole, "csv": 0}, {**train("run", None, "run/c/last.ckpt"), "csv": 0})


def test_a_second_ctrl_c_during_a_long_step_from_outside() -> None:
    def slow(module: Any, batch: Any, batch_idx: int) -> Tensor:
        print("in the step", flush=True)
        time.sleep(50)
        loss: Tensor = module.loss(batch)
        return loss

    child = Apart(partial(trainer().fit, Steps(slow), loader()))
    child.wait_for("in the step")
    child.send(INT)
    time.sleep(0.3)
    assert child.process.is_alive(), "the first Ctrl-C waits for the step"
    child.send(INT)
    assert child.end(10) == 130
    assert "KeyboardInterrupt" in child.err and "stopped after" not in child.out


# The whole process group, as a cluster and a terminal do it


class Slow(Dataset[Any]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.005)
        return dataset(400)[index]


class SlowStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Slow()[index] for index in range(400))


def own_init(worker_id: int, note: str) -> None:
    print(note, worker_id, flush=True)


LOADERS = {
    "map": lambda: DataLoader(Slow(), 4, num_workers=2),
    "persistent": lambda: DataLoader(Slow(), 4, num_workers=2, persistent_workers=True),
    "stream": lambda: DataLoader(SlowStream(), 4, num_workers=2),
    "own init": lambda: DataLoader(SlowStream(), 4, num_workers=2, worker_init_fn=partial(own_init, note="worker")),
}


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 143), (INT, 130)], ids=["TERM", "USR1", "INT"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_signal_to_the_process_group_leaves_workers_reading(number: int, code: int, kind: str) -> None:
    def work() -> None:
        tell = at("on_train_batch_end", 3, lambda run: print("training", flush=True))
        saver = ModelCheckpoint("c", save_last=True, save_top_k=0)
        trainer(callbacks=[tell, saver], enable_checkpointing=True).fit(Net(), LOADERS[kind]())

    child = Apart(work, group=True)
    child.wait_for("training")
    child.send(number, group=True)
    assert child.end(20) == code, child.err
    assert "DataLoader worker" not in child.err and "stopped after" in child.out
    assert number == INT or "Traceback" not in child.err
    assert child.err.count("Traceback") <= 1
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] >= 3


# Slurm


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's command; notes its arguments and the files there are, and exits with $SCONTROL_CODE."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    calls = tmp_path / "calls"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nls {tmp_path}/run/c >> {calls}\n'
        'echo "slurm says no" >&2\nexit ${SCONTROL_CODE:-0}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return calls


ARRAY = {"SLURM_JOB_ID": "1024", "SLURM_ARRAY_JOB_ID": "1000", "SLURM_ARRAY_TASK_ID": "24"}


@pytest.mark.parametrize(
    ("variables", "job"), [({"SLURM_JOB_ID": "77"}, "77"), (ARRAY, "1000_24")], ids=["job", "array"]
)
def test_a_job_is_requeued_once_after_the_checkpoint_is_there(
    variables: dict[str, str], job: str, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert exit_of("run", at("on_train_batch_end", 2, send(USR1))) == 143
    assert scontrol.read_text().splitlines() == [f"requeue {job}", "last.ckpt"]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_wait_until_the_job_is_queued(rank: int, scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("RANK", str(rank))
    met = []
    monkeypatch.setattr(engine.signals.distributed, "barrier", lambda: met.append(scontrol.exists()))
    with pytest.raises(SystemExit):
        engine.signals.leave(engine.signals.USR1)
    assert scontrol.exists() == (rank == 0)
    assert met == [rank == 0]


@pytest.mark.parametrize("number", [TERM, INT])
def test_other_signals_do_not_requeue(number: int, scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    exit_of("run", at("on_train_batch_end", 2, send(number)))
    assert not scontrol.exists()


def test_without_slurm_nothing_is_requeued(scontrol: Path) -> None:
    exit_of("run", at("on_train_batch_end", 2, send(USR1)))
    assert not scontrol.exists()


@pytest.mark.parametrize("fault", ["fails", "missing", "cannot start"])
def test_where_requeuing_fails_a_warning_says_so(fault: str, scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SCONTROL_CODE", "1")
    tool = scontrol.parent / "bin" / "scontrol"
    if fault == "missing":
        tool.unlink()
        monkeypatch.setenv("PATH", "/nowhere")
    if fault == "cannot start":
        tool.write_text("#!/nowhere/interpreter\n")
    with pytest.warns(UserWarning, match="scontrol requeue 77 failed .*queue the job again by hand"):
        assert exit_of("run", at("on_train_batch_end", 2, send(USR1))) == 143
    assert Path("run/c/last.ckpt").is_file()


# max_time


@pytest.mark.parametrize("span", ["00:00:00:01", timedelta(seconds=0.4), {"seconds": 1}], ids=str)
def test_max_time_ends_within_an_epoch_and_resuming_changes_no_bit(
    span: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(run: engine.Trainer) -> None:
        time.sleep(1.1)

    whole = train("run")
    for file in Path("run").rglob("*.*"):
        file.unlink()
    train("run", at("on_train_batch_start", 8, wait), max_time=span)
    saved = Path("run/c/last.ckpt").resolve()
    assert f"max_time: stopped after 8 steps; saved {saved}" in capsys.readouterr().out
    last = torch.load("run/c/last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"], last["state"]["batches_done"]) == (1, 8, 3)
    assert_same(whole, train("run", None, "run/c/last.ckpt"))


def test_max_time_alone_lifts_the_limit_of_epochs_and_holds_for_each_fit() -> None:
    run = trainer(max_epochs=None, max_time={"milliseconds": 300})
    begin = time.monotonic()
    run.fit(model := Net(), loader())
    steps = run.global_step
    run.fit(model, loader())
    assert steps > 4 and run.global_step > steps
    assert 0.5 < time.monotonic() - begin < 5


WRONG = ["1 hour", "12:00:00", "00:00:00:00", "", 5, 1.5, {}, {"hours": -1}, {"fortnights": 1}, timedelta(0)]
WRONG += ["9999999999:00:00:00", {"hours": "1"}, {"seconds": float("nan")}, {"days": 10**12}]


@pytest.mark.parametrize("span", WRONG, ids=str)
def test_a_wrong_max_time_is_refused_with_one_line(span: Any) -> None:
    with pytest.raises(engine.MisconfigurationException) as caught:
        trainer(max_time=span)
    assert "max_time=" in str(caught.value) and "\n" not in str(caught.value)

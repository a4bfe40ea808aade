"""`main.py --find_lr` and `--find_batch_size`: a line to go on with, a picture, and nothing else left behind."""

from __future__ import annotations

import errno
import importlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false")
SMALL = ("--model.width", "4")
finding_lr, finding_size, searching = (
    importlib.import_module(f"utils.{name}") for name in ("find_lr", "find_batch_size", "search")
)


def fails(outcome: Any, text: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert text in outcome.err


def shows_something(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) >= 500
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5)) for colour in ("#0072B2", "#D55E00")}
    assert colours <= set(map(tuple, np.unique(pixels, axis=0).tolist()))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_learning_rate_is_found_and_can_be_trained_with(run: Callable, tmp_path: Path) -> None:
    outcome = run("--find_lr", *SMALL)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    rate = outcome.metrics["lr"]
    expected = f"learning rate  {rate:g}: python main.py --lr {rate:g} ...  (picture: logs/standard_net/find_lr.png)\n"
    assert outcome.out == expected
    assert files(tmp_path) == ["logs/standard_net/find_lr.png"]
    shows_something(tmp_path / "logs/standard_net/find_lr.png")
    # Adam's usual rates for so small a net.
    assert 1e-3 < rate < 1e-1
    trained = run("--lr", f"{rate:g}", *SMALL, *QUIET, "--max_epochs", "2")
    saved = torch.load(tmp_path / "logs/standard_net/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["lr"] == rate
    assert trained.metrics["val_loss"] < 1.8


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The rates that optimizers step with."""
    seen: list[list[float]] = []

    class Seen(finding_lr.RisingRate):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])
            assert trainer.precision == "bf16-mixed" and type(optimizer).__name__ == "SGD"
            assert len(self.losses) == len(seen) - 1

    monkeypatch.setattr(finding_lr, "RisingRate", Seen)
    return seen


def test_the_search_heeds_the_flags_of_training(steps: list[list[float]], run: Callable, tmp_path: Path) -> None:
    words = ("--optimizer", "SGD", "--weight_decay", "0", "--lr_scales.features", "0.1", "--lr", "5")
    words += ("--optimizer_args.momentum", "0.9", "--model.width", "8")
    words += ("--lr_schedule", "onecycle", "--warmup_steps", "500", "--precision", "bf16-mixed", "--batch_size", "16")
    # Six batches in an epoch, and three steps.
    words += ("--accumulate_grad_batches", "2", "--limit_train_batches", "6", "--val_check_interval", "6")
    outcome = run("--find_lr", "--experiment", "slow", *words)
    assert outcome.code == 0, outcome.err
    assert len(steps) == finding_lr.STEPS
    rates = np.geomspace(1e-6, 10, len(steps))
    highest = [max(step) for step in steps]
    assert np.allclose(highest, rates) and all(min(step) == pytest.approx(max(step) / 10) for step in steps)
    assert files(tmp_path) == ["logs/slow/find_lr.png"]


@pytest.mark.parametrize("valley", [-4.0, -2.0, -0.5])
def test_the_suggestion_lies_on_the_way_down(valley: float) -> None:
    rates = np.geomspace(1e-6, 10, 100)
    place = np.log10(rates) - valley
    # Falls by an S over two decades, is lowest at 10^valley, and rises steeply.
    losses = 1 + 1.5 / (1 + np.exp(4 * (place + 1))) + np.exp(np.minimum(4 * place, 20)) * 0.5
    losses += np.random.default_rng(0).normal(0, 0.05, 100)
    found = finding_lr.suggest(rates, losses, finding_lr.smoothed(losses))
    assert valley - 1.6 < np.log10(found) < valley - 0.6
    noise = np.random.default_rng(0).normal(2.3, 0.05, 100)
    assert finding_lr.suggest(rates, noise, finding_lr.smoothed(noise)) is None
    rising = 2.3 + np.exp(np.minimum(4 * place, 20))
    assert finding_lr.suggest(rates, rising, finding_lr.smoothed(rising)) is None


def test_where_no_rate_helps_that_is_said(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding_lr, "HIGHEST", 2e-6)
    fails(run("--find_lr", *SMALL), "the loss fell at no rate from 1e-06 to 2e-06 by more than it varies (see logs/")
    assert files(tmp_path) == ["logs/standard_net/find_lr.png"]
    monkeypatch.setattr(finding_lr, "LOWEST", 1e25)
    monkeypatch.setattr(finding_lr, "HIGHEST", 1e30)
    fails(run("--find_lr", "--experiment", "bad", *SMALL), "the loss is no number")
    assert not (tmp_path / "logs/bad").exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hundredths of a second for each batch size."""
    monkeypatch.setattr(finding_size, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(finding_size, "SECONDS", 0.02)
    return


def test_a_batch_size_is_found(
    quick: None, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, sizes = finding_size._measure, []

    def seen(model: Any, data: Any, settings: Any, size: int) -> Any:
        one = measured(model, data, settings, size)
        sizes.append(one)
        assert data.train_dataloader().batch_size == size
        return one

    monkeypatch.setattr(finding_size, "_measure", seen)
    outcome = run("--find_batch_size", "--lr_schedule", "onecycle", *SMALL)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    size = int(outcome.metrics["batch_size"])
    assert re.fullmatch(
        rf"batch size  {size}: its learning rate is found by python main.py --batch_size {size} --find_lr \.\.\.  "
        r"\([\d,.]+ samples/s, [\d.]+ GiB; picture: logs/standard_net/find_batch_size\.png\)\n",
        outcome.out,
    )
    assert files(tmp_path) == ["logs/standard_net/find_batch_size.png"]
    shows_something(tmp_path / "logs/standard_net/find_batch_size.png")
    assert [one.size for one in sizes] == [8 * 2**n for n in range(len(sizes))] and 3 <= len(sizes) <= 8
    best = max(one.speed for one in sizes)
    assert size == min(one.size for one in sizes if one.speed >= 0.9 * best)
    assert all(1e8 < one.memory < 1e11 for one in sizes)


def test_speed_is_samples_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(finding_size.time, "perf_counter", lambda: clock[0])
    trainer, module = Namespace(should_stop=False), Namespace(device=torch.device("cpu"))
    watch = finding_size.Stopwatch()
    # The first opens files; the last of an epoch is smaller.
    for seconds, samples in ((9.0, 4), (0.2, 4), (0.2, 4), (0.4, 4), (0.4, 4), (0.4, 2), (1.0, 4)):
        assert not trainer.should_stop
        clock[0] += seconds
        watch.on_train_batch_end(trainer, module, {}, [{"text": ["a", "b"], "a": torch.zeros(samples, 3)}, None], 0)
        if trainer.should_stop:
            break
    assert watch.samples / (watch.end - watch.begin) == pytest.approx(10 / 1.2)


@pytest.mark.parametrize(
    ("speeds", "last", "chosen"),
    [
        ([10, 20, 40, 41, 41, 99], 128, 32),
        ([10, 20, 40, 41, 43, 44, 44, 99], 512, 32),
        ([10, 20, 40, 80, "full"], 64, 64),
        ([10, 20, 25, 27, "full"], 64, 32),
    ],
)
def test_sizes_double_until_it_does_not_pay(
    speeds: list[Any], last: int, chosen: int, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(finding_size, "STEPS_OF_AN_EPOCH", 1)

    def measure(model: Any, data: Any, settings: Any, size: int) -> Any:
        data.setup("fit")
        speed = speeds[len(tried)]
        if speed == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        tried.append(size)
        return finding_size.Measured(size, speed, None)

    monkeypatch.setattr(finding_size, "_measure", measure)
    outcome = run("--find_batch_size", *SMALL)
    assert outcome.code == 0, outcome.err
    assert tried[-1] == last and outcome.metrics["batch_size"] == chosen


def test_memory_is_not_used_up(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: Any, data: Any, settings: Any, size: int) -> Any:
        data.setup("fit")
        return finding_size.Measured(size, size, 2**30 + size * 2**20)

    monkeypatch.setattr(finding_size, "_measure", measure)
    # 64 to 128 takes 64 MiB more; 128 would have to fit twice.
    monkeypatch.setattr(finding_size, "_available_memory", lambda: 200 * 2**20)
    assert run("--find_batch_size", *SMALL).metrics["batch_size"] == 128
    monkeypatch.undo()
    there = finding_size._available_memory()
    assert there is not None and 2**26 < there < 2**45

    def full(*arguments: Any) -> Any:
        raise importlib.import_module("engine").MisconfigurationException("the net fails") from MemoryError()

    monkeypatch.setattr(finding_size, "_measure", full)
    monkeypatch.chdir(tmp_path)
    fails(run("--find_batch_size", *SMALL), "not even 8 samples fit into memory")


def test_what_cannot_be_searched_is_one_line(
    quick: None, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(run("--find_lr", "--find_batch_size"), "give one of them; first --find_batch_size")
    fails(run("--find_lr", "--fast_dev_run", "true"), "--find_lr and --fast_dev_run")
    (tmp_path / "net.ckpt").write_text("")
    fails(run("--find_batch_size", "--ckpt_path", "auto"), "leave out --ckpt_path")
    fails(run("--find_lr", "--devices", "2", "--accelerator", "cpu"), "--find_lr runs in one process")
    fails(run("--find_lr", "--num_folds", "3", "--fold", "all"), "--find_lr takes one fold")
    (tmp_path / "file").write_text("")
    fails(run("--find_lr", "--log_dir", "file"), "the folder file/standard_net cannot be made")
    rows = [f"{n},{n % 2}" for n in range(12)]
    (tmp_path / "few.csv").write_text("\n".join(["a,b", *rows]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "few.csv", "--model_name", "mlp", "--num_workers", "0")
    fails(run("--find_batch_size", *words), "samples to train on are too few to compare sizes")
    assert files(tmp_path) == ["few.csv", "file", "net.ckpt"]


def test_a_full_disk_leaves_no_picture(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding_lr, "STEPS", 30)
    monkeypatch.setattr(finding_lr, "LOWEST", 1e-3)

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(run("--find_lr", *SMALL), "No space left on device; logs/standard_net/find_lr.png could not be written", 1)
    assert files(tmp_path) == []

"""A generated project on a GPU: compiled, with batches that are copied from pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
import pytest
import torch

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("there", [True, False])
def test_memory_is_pinned_only_where_there_is_a_gpu(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import DInterface

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    data = DInterface()
    data.setup("fit")
    loaders = [data.train_dataloader(), *data.val_dataloader().values(), *data.test_dataloader().values()]
    assert [loader.pin_memory for loader in loaders] == [there] * 3


@gpu_only
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_compiled_run_learns_on_a_gpu(precision: str, run: Callable) -> None:
    outcome = run("--compile", "true", "--precision", precision, "--accelerator", "gpu")
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] > 0.95
    judged = run("test", "--ckpt_path", "best", "--compile", "false")
    assert judged.metrics["test_acc"] == pytest.approx(outcome.metrics["test_acc"], abs=0.01)


@gpu_only
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_with_everything_on_learns_and_its_checkpoint_is_that_of_any_other(precision: str, run: Callable) -> None:
    words = ("--channels_last", "true", "--matmul_precision", "high", "--benchmark", "true", "--gradient_clip_val", "1")
    outcome = run(*words, "--precision", precision, "--accelerator", "gpu")
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] > 0.95
    judged = run("test", "--ckpt_path", "best", "--channels_last", "false", "--accelerator", "cpu")
    assert judged.metrics["test_acc"] == pytest.approx(outcome.metrics["test_acc"], abs=0.01)


@gpu_only
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_with_the_default_callbacks_does_not_wait_between_log_steps(
    precision: str, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import main

    watched = []

    class NoWaiting(engine.Callback):
        """Lets torch raise where a step of the second epoch that fetches no value waits for the GPU."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            logs = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
            watch = trainer.current_epoch > 0 and not logs and not trainer.is_last_batch
            torch.cuda.set_sync_debug_mode("error" if watch else "default")
            watched.append(watch)

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            torch.cuda.set_sync_debug_mode("default")

    usual = main.callbacks
    monkeypatch.setattr(main, "callbacks", lambda arguments: [NoWaiting(), *usual(arguments)])
    words = ("--gradient_clip_val", "1", "--channels_last", "true", "--max_epochs", "3", "--ema_decay", "0.9")
    outcome = run(*words, "--precision", precision, "--accelerator", "gpu")
    assert outcome.code == 0, outcome.err
    assert sum(watched) > 10

"""A generated project on a GPU: compiled, with batches that are copied from pinned memory."""

from __future__ import annotations

from collections.abc import Callable

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

"""What only a GPU can show: number formats, nccl, compiled kernels, and steps that never wait for the device."""

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
from engine.hooks import move_to_device
from on_gpu import NoWaiting, Stripes, train
from torch import Tensor
from toy import weights

HERE = Path(__file__).parent
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def learned(losses: list[float]) -> bool:
    return len(losses) > 4 and losses[-1] < 0.5 * losses[0]


@gpu_only
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_format_of_numbers_learns_and_goes_on(precision: str) -> None:
    engine.seed_everything(2)
    whole = Stripes()
    losses = train(whole, precision=precision)
    assert learned(losses)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    engine.seed_everything(77)
    again = Stripes()
    train(again, "c/epoch=1.ckpt", precision=precision)
    assert torch.allclose(weights(whole), weights(again), atol=1e-3)


@gpu_only
def test_a_compiled_net_trains_to_the_same_losses() -> None:
    losses = []
    for compiled in (False, True):
        engine.seed_everything(2)
        model = Stripes(compiled)
        # Compiled dropout draws other numbers.
        model.net[5].p = 0.0
        losses.append(train(model))
        assert not any("_orig_mod" in name for name in model.state_dict())
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


@gpu_only
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}], ids=str)
def test_steps_between_log_steps_do_not_wait_for_the_gpu(options: dict[str, Any]) -> None:
    watch = NoWaiting()
    clipping = {"gradient_clip_val": 1.0, "enable_progress_bar": True}
    assert learned(train(Stripes(), callbacks=[watch], max_epochs=6, **clipping, **options))
    assert watch.watched > 10


@gpu_only
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fused_optimizers_clip_and_skip_without_waiting_for_the_gpu(precision: str) -> None:
    """Also under fp16, where an optimizer that is not fused asks in each step whether gradients are finite."""
    watch = NoWaiting()
    options = {"gradient_clip_val": 0.5, "enable_progress_bar": True, "max_epochs": 6, "precision": precision}
    assert learned(train(Stripes(fused=True), callbacks=[watch], **options))
    assert watch.watched > 10


@gpu_only
def test_fp16_with_a_fused_optimizer_has_the_losses_of_one_that_is_not() -> None:
    losses = []
    for fused in (True, False):
        engine.seed_everything(2)
        model = Stripes(fused=fused)
        model.net[5].p = 0.0
        losses.append(train(model, precision="16-mixed", gradient_clip_val=0.5, max_epochs=2))
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@gpu_only
def test_a_fused_run_goes_on_to_the_same_weights() -> None:
    engine.seed_everything(2)
    whole = Stripes(fused=True)
    train(whole, precision="16-mixed", gradient_clip_val=0.5)
    again = Stripes(fused=True)
    train(again, "c/epoch=1.ckpt", precision="16-mixed", gradient_clip_val=0.5)
    assert torch.allclose(weights(whole), weights(again), atol=1e-3)


@gpu_only
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=str)
def test_channels_last_trains_to_the_same_losses_without_waiting(options: dict[str, Any]) -> None:
    losses = []
    for channels_last in (False, True):
        engine.seed_everything(2)
        watch = NoWaiting()
        model = Stripes(channels_last=channels_last, fused=True)
        model.net[5].p = 0.0
        losses.append(train(model, callbacks=[watch], **options))
        assert watch.watched > 10
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@gpu_only
def test_a_step_that_waits_is_found() -> None:
    class Waits(Stripes):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.newest = loss.item()
            return loss

    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        train(Waits(), callbacks=[NoWaiting()])


def under_torchrun(script: str, strategy: str, *words: str) -> None:
    """Run a script on one process of its own, over nccl."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(HERE / script), strategy, str(Path(engine.__file__).parents[1]), str(HERE), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]


@gpu_only
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_over_nccl_learns(strategy: str) -> None:
    under_torchrun("on_gpu.py", strategy)
    result = json.loads(Path("result.json").read_text())
    step, parameter, backend = result["wraps"]
    assert learned(result["losses"]) and "cuda:nccl" in backend
    if strategy == "ddp":
        assert step == "DistributedDataParallel" and result["watched"] > 10
    else:
        assert parameter == "DTensor"


@gpu_only
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_over_nccl_has_the_losses_of_the_cpu(strategy: str) -> None:
    names = "float32,accumulated,clipped,synchronised"
    results = []
    for accelerator in ("cpu", "gpu"):
        under_torchrun("equality.py", strategy, names, accelerator)
        results.append({name: json.loads(Path(f"{name}-1-0.json").read_text()) for name in names.split(",")})
    on_cpu, on_gpu = results
    for name in names.split(","):
        assert on_gpu[name]["losses"] == pytest.approx(on_cpu[name]["losses"], abs=1e-4), name
        assert on_gpu[name]["test"] == on_cpu[name]["test"]


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("cpu", True)])
def test_batches_move_to_a_gpu_without_waiting(device: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[Any] = []

    def to(tensor: Tensor, where: torch.device, non_blocking: bool = False) -> Tensor:
        moves.append((where.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    move_to_device({"images": torch.zeros(2), "more": [torch.zeros(1)]}, torch.device(device))
    assert moves == [(device, not waits)] * 2


@gpu_only
def test_pinned_batches_reach_the_gpu_from_pinned_memory() -> None:
    class Looks(Stripes):
        pinned: list[bool] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.pinned.append(all(part.is_pinned() for part in batch))
            return batch

    train(Looks(), max_epochs=1)
    assert Looks.pinned and all(Looks.pinned)

"""Number formats on the CPU: what autocast covers, what stays float32, loss scaling."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from torch import nn
from toy import Net, fit, loader, trainer, weights

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
AUTOCAST = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Small(Net):
    """With gradients small enough for fp16 at the first loss scale, 65536."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * 0.01


class Look(Net):
    """Notes the type of what its layer gives in each stage, and of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[Any]] = {"train": set(), "val": set(), "test": set(), "predict": set()}
        self.gradients: set[Any] = set()
        self.stage = "train"

    def forward(self, x: Any) -> Any:
        out = super().forward(x)
        self.types[self.stage].add(out.dtype)
        return out.float()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.stage = "train"
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients |= {p.grad.dtype for p in self.parameters() if p.grad is not None}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.stage = "val"
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.stage = "test"
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.stage = "predict"
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_is_in_effect_in_every_step_and_weights_stay_float32(precision: Any) -> None:
    model, run = Look(), trainer(precision=precision)
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    run.predict(model, loader())
    assert model.types == {stage: {AUTOCAST[precision]} for stage in model.types}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.gradients == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_improves_in_every_precision(precision: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    data = torch.utils.data.TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))
    train = torch.utils.data.DataLoader(data, batch_size=8)
    model, run = Net(), trainer(precision=precision, max_epochs=5)
    [before] = run.validate(model, train, verbose=False)
    run.fit(model, train)
    [after] = run.validate(model, train, verbose=False)
    assert after["val_loss"] < 0.05 * before["val_loss"]


def test_fp16_unscales_gradients_before_the_hook_and_before_clipping() -> None:
    class Moments(Small):
        def on_after_backward(self) -> None:
            self.scaled = norm(self)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.unscaled = norm(self)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.clipped = norm(self)

    def norm(model: Net) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))

    model, plain = Moments(), Moments()
    plain.load_state_dict(model.state_dict())
    fit(plain, limit_train_batches=1, gradient_clip_val=0.005)
    fit(model, limit_train_batches=1, gradient_clip_val=0.005, precision="16-mixed")
    assert model.scaled == pytest.approx(65536 * plain.unscaled, rel=0.01)
    assert model.unscaled == pytest.approx(plain.unscaled, rel=0.01)
    assert model.unscaled > 0.005 and model.clipped == pytest.approx(0.005, rel=1e-3)
    torch.testing.assert_close(weights(model), weights(plain), rtol=0.01, atol=1e-3)


def test_fp16_accumulation_and_clipping_agree_with_float32() -> None:
    results = []
    for precision in ("32-true", "16-mixed"):
        engine.seed_everything(1)
        model = Net()
        fit(model, loader(10), precision=precision, accumulate_grad_batches=3, gradient_clip_val=0.1, max_epochs=2)
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=2e-3)


def test_fp16_skips_an_update_with_infinite_gradients_and_lowers_the_scale() -> None:
    class Overflow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * (1e38 if batch_idx == 0 else 1.0)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.after.append(weights(self))

    model = Overflow()
    model.after = [weights(model)]  # type: ignore[assignment]
    run = fit(model, precision="16-mixed", limit_train_batches=2)
    assert model.after[0].equal(model.after[1]) and not model.after[1].equal(model.after[2])
    run.save_checkpoint("scale.ckpt")
    saved = torch.load("scale.ckpt", weights_only=True)
    assert saved["precision"]["scale"] == 32768.0


def test_fp16_takes_training_steps_without_a_loss() -> None:
    class Nothing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    assert fit(Nothing(), precision="16-mixed").global_step == 4


def test_the_loss_scale_is_saved_and_restored() -> None:
    run = fit(Small(), precision="16-mixed")
    run.save_checkpoint("a.ckpt")
    saved = torch.load("a.ckpt", weights_only=True)
    assert saved["precision"]["scale"] == 65536.0 and saved["precision"]["_growth_tracker"] == 4
    saved["precision"]["scale"] = 1024.0
    torch.save(saved, "b.ckpt")
    again = trainer(precision="16-mixed", max_epochs=1)
    again.fit(Net(), loader(), ckpt_path="b.ckpt")
    again.save_checkpoint("c.ckpt")
    assert torch.load("c.ckpt", weights_only=True)["precision"]["scale"] == 1024.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_fp16_there_is_no_scale(precision: Any) -> None:
    run = fit(Net(), loader(2), precision=precision)
    run.save_checkpoint("a.ckpt")
    assert torch.load("a.ckpt", weights_only=True)["precision"] == {}

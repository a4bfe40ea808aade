"""One training step: what training_step may return, accumulation, clipping; against loops written by hand."""

from __future__ import annotations

import weakref
from typing import Any

import engine
import pytest
import torch
from torch import Tensor, nn
from toy import Net, Steps, fit, loader, same_bits, stream, weights


def by_hand(batches: list[Any], epochs: int = 1, window: int = 1, clip: Any = lambda parameters: None) -> Tensor:
    """Weights of a `Net` trained with plain torch: the gradient of a window is the mean over its batches."""
    engine.seed_everything(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for start in range(0, len(batches), window):
            optimizer.zero_grad()
            group = batches[start : start + window]
            for batch in group:
                (model.loss(batch) / len(group)).backward()
            clip(model.parameters())
            optimizer.step()
    return weights(model)


@pytest.mark.parametrize("make", [loader, stream], ids=["sized", "unsized"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [6, 8, 10])
def test_accumulation_equals_a_loop_by_hand_with_the_last_window_divided_by_its_own_size(
    make: Any, window: int, size: int
) -> None:
    model = Net()
    run = fit(model, make(size), accumulate_grad_batches=window, max_epochs=2)
    expected = by_hand(list(loader(size)), epochs=2, window=window)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)
    assert run.global_step == 2 * -(-(size // 2) // window)


def test_a_limit_cuts_the_last_window_too() -> None:
    model = Net()
    fit(model, loader(12), accumulate_grad_batches=3, limit_train_batches=4)
    torch.testing.assert_close(weights(model), by_hand(list(loader(8)), window=3), rtol=0, atol=1e-6)


class KeepsZeros(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


def with_attribute(parameters: Any, lr: float) -> torch.optim.Optimizer:
    optimizer: Any = torch.optim.SGD(parameters, lr=lr)
    clear = optimizer.zero_grad
    optimizer.zero_grad = lambda: clear(set_to_none=False)
    return optimizer  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "kept"), [(torch.optim.SGD, False), (KeepsZeros, True), (with_attribute, True)])
def test_an_optimizer_that_clears_gradients_in_its_own_way_is_asked_to(make: Any, kept: bool) -> None:
    seen = list[bool]()

    class Model(Net):
        def configure_optimizers(self) -> Any:
            return make(self.parameters(), lr=0.1)

        def on_before_backward(self, loss: Tensor) -> None:
            seen.append(all(p.grad is not None for p in self.parameters()))

    model = Model()
    fit(model, loader(8))
    assert seen == [False] + [kept] * 3
    torch.testing.assert_close(weights(model), by_hand(list(loader(8))), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "clip"),
    [
        ("norm", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05)),
        ("value", lambda parameters: nn.utils.clip_grad_value_(parameters, 0.05)),
    ],
)
@pytest.mark.parametrize("window", [1, 3])
def test_clipping_equals_a_loop_by_hand(algorithm: Any, clip: Any, window: int) -> None:
    model = Net()
    fit(model, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm, accumulate_grad_batches=window, max_epochs=2)
    clipped = by_hand(list(loader()), epochs=2, window=window, clip=clip)
    torch.testing.assert_close(weights(model), clipped, rtol=0, atol=1e-6)
    assert not torch.allclose(clipped, by_hand(list(loader()), epochs=2, window=window))


@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_no_clipping_without_a_limit(value: Any) -> None:
    model = Net()
    fit(model, gradient_clip_val=value)
    assert weights(model).equal(by_hand(list(loader())))


def test_gradients_are_not_yet_clipped_in_on_before_optimizer_step() -> None:
    norms = []

    class Look(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters()]))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    fit(Look(), limit_train_batches=1, gradient_clip_val=0.01)
    assert norms[0] > 0.1 and norms[1] <= 0.0101


def test_an_own_gradient_clipping_replaces_the_trainers() -> None:
    class Own(Net):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val * 2, "value")

    model = Own()
    fit(model, gradient_clip_val=0.025)
    expected = by_hand(list(loader()), clip=lambda parameters: nn.utils.clip_grad_value_(parameters, 0.05))
    assert weights(model).equal(expected)


def test_weights_after_three_epochs_equal_a_bare_loop_bit_for_bit() -> None:
    def parts() -> tuple[Any, Any, Any]:
        engine.seed_everything(3)
        model = Net()
        model.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)

    bare, optimizer, scheduler = parts()
    bare.train()
    for _ in range(3):
        # A loader draws its workers' seed, from the global generator unless it has one of its own.
        for batch in loader(16, 4, generator=torch.Generator()):
            loss = bare.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    model, optimizer, scheduler = parts()
    model.configure_optimizers = lambda: ([optimizer], [{"scheduler": scheduler, "interval": "step"}])
    # Validation in between must leave no trace.
    fit(model, loader(16, 4), loader(6), max_epochs=3, num_sanity_val_steps=2)
    assert same_bits(dict(model.state_dict()), dict(bare.state_dict()))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["tensor", "dict", "one element"])
def test_the_loss_may_be_a_tensor_or_in_a_dict(kind: str) -> None:
    ends = []

    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        loss = model.loss(batch)
        extra = {"loss": loss, "more": loss * 2, "text": "x"}
        return {"tensor": loss, "dict": extra, "one element": loss.reshape(1)}[kind]

    class Look(Steps):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append(outputs)

    model = Look(step)
    fit(model, accumulate_grad_batches=2)
    expected = by_hand(list(loader()), window=2)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-6)
    assert set(ends[0]) == ({"loss", "more", "text"} if kind == "dict" else {"loss"})
    assert not any(out["loss"].requires_grad for out in ends)


def test_outputs_hold_the_loss_divided_by_the_accumulation() -> None:
    losses = []

    class Look(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    model = Look()
    first = float(model.loss(next(iter(loader()))).detach())
    fit(model, accumulate_grad_batches=4)
    assert losses[0] == pytest.approx(first / 4)


@pytest.mark.parametrize("window", [1, 3])
def test_none_skips_the_update_but_counts_the_step(window: int) -> None:
    ends: list[Any] = []

    class Look(Steps):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append(outputs)

    model = Look(lambda *_: None)
    before = weights(model)
    run = fit(model, accumulate_grad_batches=window)
    assert weights(model).equal(before)
    assert (run.global_step, ends) == (-(-4 // window), [{}] * 4)


def test_none_for_one_batch_keeps_the_others() -> None:
    model = Steps(lambda model, batch, idx: None if idx == 1 else model.loss(batch))
    fit(model)
    batches = list(loader())
    assert weights(model).equal(by_hand([batches[0], batches[2], batches[3]]))


BAD = {
    "a float": (lambda m, b, i: 1.0, "training_step returned float"),
    "text": (lambda m, b, i: "loss", "training_step returned str"),
    "no loss": (lambda m, b, i: {"los": m.loss(b)}, "training_step returned dict"),
    "loss of None": (lambda m, b, i: {"loss": None}, "training_step returned dict"),
    "many numbers": (lambda m, b, i: m(b[0]), r"a loss of shape \(2, 1\)"),
    "no gradient": (lambda m, b, i: m.loss(b).detach(), "a loss without gradient"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_senseless_return_value_is_refused(kind: str) -> None:
    step, message = BAD[kind]
    with pytest.raises(engine.MisconfigurationException, match=message):
        fit(Steps(step))


def test_training_step_may_leave_out_batch_idx() -> None:
    class Short(Net):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return self.loss(batch)

    model = Short()
    fit(model)
    assert weights(model).equal(by_hand(list(loader())))


def test_earlier_gradients_can_be_seen_in_training_step() -> None:
    seen = []

    def step(model: Net, batch: Any, batch_idx: int) -> Any:
        seen.append(next(model.parameters()).grad is not None)
        return model.loss(batch)

    fit(Steps(step))
    assert seen == [False, True, True, True]


def test_a_frozen_part_is_not_trained_and_its_mode_is_kept() -> None:
    class Half(Net):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval().requires_grad_(False)
            self.modes: list[tuple[bool, bool]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.modes.append((self.training, self.frozen[1].training))
            return self.loss((self.frozen(batch[0]), batch[1]))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.modes.append((self.training, self.frozen[1].training))

    model = Half()
    before = weights(model.frozen)
    fit(model, None, loader(2), max_epochs=2, limit_train_batches=1, num_sanity_val_steps=1)
    assert model.modes == [(False, False), (True, False), (False, False), (True, False), (False, False)]
    assert weights(model.frozen).equal(before)
    assert model.training and not model.frozen[1].training


class Held:
    """Something that a function keeps for its backward pass."""


class Keeps(torch.autograd.Function):
    """The identity, which keeps an object that lives as long as its node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Held) -> Tensor:
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


@pytest.mark.parametrize("manual", [False, True])
def test_a_graph_that_is_retained_does_not_outlive_its_step(manual: bool) -> None:
    class Retains(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.alive: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            held = Held()
            self.held = weakref.ref(held)
            return Keeps.apply(self.loss(batch), held)  # type: ignore[no-any-return, no-untyped-call]

        def backward(self, loss: Tensor) -> None:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.alive.append(self.held() is not None)

    model = Retains()
    fit(model)
    assert model.alive == [False] * 4

"""Checkpoints say nothing of how a net lies in memory: a run goes on in another format than it began in."""

from __future__ import annotations

from typing import Any

import engine
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy import trainer, weights

WINDOW = 4


class Images(engine.Module):
    """Two convolutions, and an optimizer that takes its numbers from memory as they come."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]).mean(dim=(1, 2, 3)) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class SaveWithinWindow(engine.Callback):
    """Saves after half of the first window's batches."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.state.batches_done == WINDOW // 2:
            trainer.save_checkpoint("half.ckpt")


def train(channels_last: bool, ckpt_path: str | None = None) -> Tensor:
    """Two windows of batches."""
    images = torch.randn(4 * WINDOW, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    callbacks = [] if ckpt_path else [SaveWithinWindow()]
    run = trainer(max_epochs=1, accumulate_grad_batches=WINDOW, callbacks=callbacks)
    model = Images(channels_last)
    run.fit(model, DataLoader(TensorDataset(images), 2), ckpt_path=ckpt_path)
    return weights(model)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_of_an_open_window_fit_the_format_of_the_run_that_goes_on(before: bool, after: bool) -> None:
    expected = train(before)
    assert torch.load("half.ckpt", weights_only=True)["gradients"][0]
    resumed = train(after, "half.ckpt")
    assert torch.allclose(resumed, expected, atol=1e-5) and (before != after or torch.equal(resumed, expected))

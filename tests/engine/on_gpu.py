"""What `test_gpu.py` trains, in its own process or under torchrun: `on_gpu.py STRATEGY ENGINE TESTS`."""

from __future__ import annotations

# ruff: noqa: E402
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:4]

import engine
import torch
import torch.distributed as dist
from engine.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy import Memory, trainer

LOG_EVERY = 5


class Stripes(engine.Module):
    """Tells images with horizontal stripes from those with vertical ones."""

    def __init__(self, compiled: bool = False, channels_last: bool = False, fused: bool | None = None) -> None:
        super().__init__()
        self.compiled, self.channels_last, self.fused = compiled, channels_last, fused
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 2)),
        )

    def configure_model(self) -> None:
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if self.compiled:
            self.net.compile()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def stripes(size: int = 256) -> DataLoader[Any]:
    """Batches of 16 images in pinned memory."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(size) % 2
    rows = (torch.arange(8) % 2).float().expand(8, 8)
    clean = torch.where(labels[:, None, None] == 1, rows, rows.T)
    images = (clean + 0.5 * torch.randn(size, 8, 8, generator=generator)).unsqueeze(1)
    return DataLoader(TensorDataset(images, labels), 16, shuffle=True, pin_memory=True)


def train(model: Stripes, ckpt_path: str | None = None, **options: Any) -> list[float]:
    """Train on the GPU with a checkpoint after each epoch in the folder `c`; returns the losses of log steps."""
    memory = Memory()
    saver = ModelCheckpoint("c", "{epoch}", monitor="val_loss", save_top_k=-1)
    kept = {"logger": memory, "callbacks": [saver, *options.pop("callbacks", [])], "enable_checkpointing": True}
    run = trainer(**{"accelerator": "gpu", "max_epochs": 4, "log_every_n_steps": LOG_EVERY, **kept, **options})
    run.fit(model, stripes(), stripes(64), ckpt_path=ckpt_path)
    return [value for _, value in memory.of("loss_step")]


class NoWaiting(engine.Callback):
    """From the second epoch, lets torch raise where a step, or what lies between two, waits for the GPU.

    Steps that log are left out, and the last of an epoch: there values are fetched.
    """

    watched = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        logs = (trainer.global_step + 1) % LOG_EVERY == 0
        watch = trainer.current_epoch > 0 and not logs and not trainer.is_last_batch
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        self.watched += watch

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    strategy = sys.argv[1]
    engine.seed_everything(2)
    watch = NoWaiting()
    wraps: list[str] = []

    class Notes(engine.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            wraps.append(type(trainer.strategy.training_step).__name__)
            wraps.append(type(next(pl_module.parameters()).data).__name__)
            wraps.append(dist.get_backend_config())

    callbacks = [Notes(), *([watch] if strategy == "ddp" else [])]
    losses = train(Stripes(), strategy=strategy, callbacks=callbacks)
    Path("result.json").write_text(json.dumps({"losses": losses, "watched": watch.watched, "wraps": wraps}))

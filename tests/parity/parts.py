"""User code that runs on either engine: `pl` is `engine` or `pytorch_lightning`. No randomness anywhere."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def loader(batches: int = 4, batch_size: int = 2, first: int = 0) -> DataLoader[Any]:
    """So many batches of (x, y), always the same, in a fixed order; `first` shifts to other samples."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(200, 4, generator=generator)[first : first + batches * batch_size]
    return DataLoader(TensorDataset(rows[:, :3], rows[:, 3:]), batch_size=batch_size)


def loaders(lengths: tuple[int, ...], first: int = 50) -> list[DataLoader[Any]]:
    """A loader for each length, with different samples."""
    return [loader(length, first=first + 20 * n) for n, length in enumerate(lengths)]


@cache
def net(pl: ModuleType) -> type:
    """A small net that logs its losses in the usual ways."""

    class Net(pl.LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.lr = lr
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("val_loss", loss, prog_bar=True)
            return loss

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Net


@cache
def several(pl: ModuleType) -> type:
    """The net, for several loaders of each kind."""

    class Several(net(pl)):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            self.log("val_loss", self.loss(batch))
            return {"n": dataloader_idx}

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            return self(batch[0])

    return Several


@cache
def data(pl: ModuleType) -> type:
    """A data module with loaders of every kind."""

    class Data(pl.LightningDataModule):
        def __init__(self, train: int = 4, val: tuple[int, ...] = (2,)) -> None:
            super().__init__()
            self.train, self.val = train, val

        def train_dataloader(self) -> Any:
            return loader(self.train)

        def val_dataloader(self) -> Any:
            return loaders(self.val)

        def test_dataloader(self) -> Any:
            return loaders(self.val, first=60)

        def predict_dataloader(self) -> Any:
            return loaders(self.val, first=70)

        def state_dict(self) -> dict[str, Any]:
            return {"note": 1}

    return Data


class RecordingLogger:
    """Has every method of a Lightning logger, and keeps what it is given; no engine's base class."""

    name, version, save_dir, root_dir, log_dir, group_separator = "recording", "run", ".", ".", "recording", "/"
    experiment = None

    def __init__(self, note: Any) -> None:
        self.note = note
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))
        self.note(f"L.log_metrics({', '.join(sorted(metrics))}, step={step})")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.note(f"L.log_hyperparams({dict(params)})")

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.note("L.log_graph()")

    def save(self) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.note("L.after_save_checkpoint()")

    def finalize(self, status: str) -> None:
        self.note(f"L.finalize({status})")

"""Small real parts that the engine's tests share: data, a network, a logger that remembers, a quiet trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import engine
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def dataset(size: int = 8, features: int = 3) -> TensorDataset:
    """The same `size` random samples (x, y) on every call; a longer one begins with the shorter one."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(512, features + 1, generator=generator)[:size]
    return TensorDataset(rows[:, :features], rows[:, features:])


def loader(size: int = 8, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    """Batches of `dataset(size)`."""
    return DataLoader(dataset(size), batch_size=batch_size, **options)


class Stream(IterableDataset[Any]):
    """The samples of `dataset(size)`, without a length."""

    def __init__(self, size: int = 8) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return iter([dataset(self.size)[i] for i in range(self.size)])


def stream(size: int = 8, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    """A loader without length."""
    return DataLoader(Stream(size), batch_size=batch_size, **options)


class Net(engine.Module):
    """Linear regression; remembers which batches it was given."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net: nn.Module = nn.Linear(3, 1)
        self.seen: list[tuple[str, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", batch_idx))
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.seen.append(("val", batch_idx))
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.seen.append(("test", batch_idx))
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def count(self, stage: str) -> int:
        """How many batches of a stage it was given."""
        return sum(name == stage for name, _ in self.seen)


class Steps(Net):
    """A `Net` whose steps are given as functions of (module, batch, batch_idx)."""

    def __init__(
        self, training: Callable[..., Any] | None = None, validation: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.hparams.clear()
        self._training, self._validation = training, validation

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", batch_idx))
        return self._training(self, batch, batch_idx) if self._training else self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.seen.append(("val", batch_idx))
        return self._validation(self, batch, batch_idx) if self._validation else None


class Memory(engine.loggers.Logger):
    """A logger that keeps everything in memory."""

    name = version = "memory"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.hparams: dict[str, Any] = {}
        self.status: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams.update(params)

    def finalize(self, status: str) -> None:
        self.status.append(status)

    def of(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has `name`."""
        return [(step, row[name]) for step, row in self.rows if name in row]


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}


def trainer(**options: Any) -> engine.Trainer:
    """A Trainer of one epoch that prints, logs and saves nothing unless told otherwise."""
    return engine.Trainer(**{**QUIET, **options})


def fit(model: engine.Module, train: Any = None, val: Any = None, **options: Any) -> engine.Trainer:
    """Fit `model` with a quiet trainer, by default on 4 batches of 2 samples."""
    run = trainer(**options)
    run.fit(model, loader() if train is None else train, val)
    return run


def weights(module: nn.Module) -> Tensor:
    """All parameters and buffers in one flat copy."""
    return torch.cat([value.detach().double().flatten().clone() for value in module.state_dict().values()])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested structures hold equal values, tensors to the last bit and of the same type."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same_kind = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same_kind and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def batches_of(loaded: Iterable[Any]) -> list[list[float]]:
    """The targets of every batch, which tell the samples apart."""
    return [y.flatten().tolist() for _, y in loaded]

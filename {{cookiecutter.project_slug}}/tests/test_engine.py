"""A smoke test of the Trainer: it trains, improves, predicts and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine.callbacks import ModelCheckpoint


class Line(engine.Module):
    """Fits a line."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader(shuffle: bool = False) -> DataLoader:
    inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8, shuffle=shuffle)


def fit(folder: Path, max_epochs: int, ckpt_path: str | None = None) -> tuple[engine.Trainer, Line]:
    engine.seed_everything(0)
    model = Line()
    checkpoint = ModelCheckpoint(dirpath=folder, monitor="val_loss", save_last=True)
    trainer = engine.Trainer(max_epochs=max_epochs, logger=False, callbacks=[checkpoint], default_root_dir=folder)
    trainer.fit(model, loader(shuffle=True), loader(), ckpt_path=ckpt_path)
    return trainer, model


def test_training_improves_and_predicts(tmp_path: Path) -> None:
    _, untrained = fit(tmp_path / "none", max_epochs=0)
    trainer, model = fit(tmp_path / "some", max_epochs=10)
    before = trainer.validate(untrained, loader(), verbose=False)[0]["val_loss"]
    after = trainer.validate(model, loader(), ckpt_path="best", verbose=False)[0]["val_loss"]
    assert after < 0.2 * before
    predictions = trainer.predict(model, loader())
    assert predictions is not None
    assert torch.cat(predictions).shape == (64, 1)


def test_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", max_epochs=4)
    fit(tmp_path / "parts", max_epochs=2)
    _, resumed = fit(tmp_path / "parts", max_epochs=4, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])

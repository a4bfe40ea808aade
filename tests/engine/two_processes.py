"""What `test_torchrun.py` runs: scenarios by name, in one process or under torchrun; results go to files."""

from __future__ import annotations

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = sys.argv[2:4]

import engine
import torch
from engine.callbacks import EarlyStopping, ModelCheckpoint
from engine.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from toy import Net, dataset, trainer, weights

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Counted(Net):
    """Counts samples in the ways that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.average = BinaryAccuracy(), MeanMetric()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own_rank", float(RANK), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.accuracy.update(self(x), (y > 0).int())
        self.average.update(y)
        self.log("accuracy", self.accuracy)
        self.log("average", self.average)
        self.log("samples", float(len(x)), reduce_fx="sum", sync_dist=True)
        self.log("val_loss", self.loss(batch), sync_dist=True)
        # Its steps cannot be reduced, since processes may have different numbers of batches; its epoch can.
        self.log("stepped", self.loss(batch), on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", y.max(), reduce_fx="max", sync_dist=True)
        self.log("smallest", y.min(), reduce_fx="min", sync_dist=True)

    test_step = validation_step  # type: ignore[assignment]


def batches(size: int, global_batch: int) -> DataLoader[Any]:
    return DataLoader(dataset(size), batch_size=global_batch // WORLD, shuffle=True)


def train(name: str, epochs: int, ckpt_path: str | None = None) -> engine.Trainer:
    saver = ModelCheckpoint(f"{name}/c", "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)
    run = trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[EarlyStopping("val_loss", patience=99), saver],
        enable_checkpointing=True,
        logger=CSVLogger(".", name, "v"),
        log_every_n_steps=1,
        num_sanity_val_steps=2,
    )
    # 5 batches in windows of 2, 2 and 1; a validation set that does not divide evenly.
    run.fit(Counted(), batches(20, 4), batches(7, 4), ckpt_path=ckpt_path)
    return run


def write(name: str, **values: Any) -> None:
    Path(f"{name}-{WORLD}-{RANK}.json").write_text(json.dumps(values))


def scenario_train() -> None:
    engine.seed_everything(3)
    run = train(f"train{WORLD}", 3)
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    write("train", weights=weights(run.module).tolist(), metrics=metrics, steps=run.global_step)


def scenario_evaluate() -> None:
    engine.seed_everything(3)
    [result] = trainer().test(Counted(), batches(7, 4), verbose=False)
    write("evaluate", **result)


def scenario_sets() -> None:
    """Two sets by name, each with metric objects of its own."""

    class Named(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.averages = torch.nn.ModuleList([MeanMetric(), MeanMetric()])

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            _, y = batch
            self.averages[dataloader_idx].update(y)
            self.log("average", self.averages[dataloader_idx])
            self.log("mean", y.mean(), sync_dist=True)
            self.log("samples", float(len(y)), reduce_fx="sum", sync_dist=True)
            self.log("largest", y.max(), reduce_fx="max", sync_dist=True)

    engine.seed_everything(3)
    run = trainer()
    results = run.test(Named(), {"day": batches(7, 4), "night": batches(3, 2)}, verbose=False)
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    write("sets", results=results, metrics=metrics)


def scenario_resume() -> None:
    engine.seed_everything(3)
    whole = weights(train(f"whole{WORLD}", 3).module)
    engine.seed_everything(77 + RANK)
    again = train(f"whole{WORLD}", 3, f"whole{WORLD}/c/epoch=0.ckpt")
    write("resume", same=bool(whole.equal(weights(again.module))), epoch=again.current_epoch)


def scenario_stop() -> None:
    """Only rank 1 sees a reason to stop."""

    class Uneven(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("own", float(self.current_epoch * RANK))

    stopping = trainer(max_epochs=9, callbacks=EarlyStopping("own", patience=2 if RANK else 99))
    stopping.fit(Uneven(), batches(8, 4), batches(8, 4))
    write("stop", epochs=stopping.current_epoch)


def scenario_fail() -> None:
    """Rank 1 fails while rank 0 waits for it."""

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if RANK == 1 and batch_idx == 1:
                raise ZeroDivisionError("on rank 1")
            return self.loss(batch)

    trainer().fit(Fails(), batches(20, 4))


def scenario_devices() -> None:
    trainer(devices=2).fit(Net(), batches(8, 4))
    write("devices", ok=True)


for scenario in sys.argv[1].split(","):
    globals()[f"scenario_{scenario}"]()

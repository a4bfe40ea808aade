"""What `test_kills.py` runs and kills: trains, and tells which samples every process was given in which batch.

    killed.py ENGINE TESTS START

Everything goes to the working folder; `START` numbers the starts of a run.
"""

from __future__ import annotations

# ruff: noqa: E402
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = sys.argv[1:3]

import engine
import torch
from engine.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from toy import Net, dataset, trainer, weights

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
NAME = f"{sys.argv[3]}-{RANK}.json"
# 46 samples in global batches of 8, so that the last one of an epoch is smaller, and four processes leave two out.
SIZE, GLOBAL, EPOCHS = 46, 8, 6


class Telling(Net):
    """Writes down the samples of each batch before it computes anything, so that none is missed."""

    def __init__(self) -> None:
        super().__init__()
        self.average = MeanMetric()
        self.file = os.open(f"taken-{NAME}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    def on_train_start(self) -> None:
        Path(f"began-{NAME}").write_text(json.dumps(self.trainer.state.total_batches))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, numbers = batch
        line = [self.current_epoch, self.trainer.state.total_batches, numbers.tolist()]
        os.write(self.file, f"{json.dumps(line)}\n".encode())
        time.sleep(0.03)
        loss = nn.functional.mse_loss(self(x), y)
        self.average.update(numbers)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("average", self.average, on_step=False, on_epoch=True)
        return loss


Path(f"pid-{NAME}").write_text(str(os.getpid()))
engine.seed_everything(3)
saver = ModelCheckpoint("checkpoints", "{step}", every_n_train_steps=2, save_last=True)
run = trainer(max_epochs=EPOCHS, callbacks=saver, enable_checkpointing=True)
data = TensorDataset(*dataset(SIZE).tensors, torch.arange(SIZE))
model = Telling()
run.fit(model, DataLoader(data, GLOBAL // WORLD, shuffle=True), ckpt_path="auto")
metrics = {name: float(value) for name, value in run.callback_metrics.items()}
Path(f"result-{NAME}").write_text(json.dumps({"weights": weights(model.net).tolist(), "metrics": metrics}))

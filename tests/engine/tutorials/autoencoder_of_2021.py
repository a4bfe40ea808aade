import engine as pl
import torch
from drawn_digits import digits
from engine.callbacks import EarlyStopping, GPUStatsMonitor, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__(train_transforms=None, val_transforms=None, dims=(1, 8, 8))
        self.batch_size = batch_size

    def prepare_data(self):
        digits(1)

    def setup(self, stage=None):
        if stage == "fit" or stage is None:
            self.train, self.val = random_split(digits(320), [256, 64])
        if stage == "test" or stage is None:
            self.held_out = digits(64, seed=3)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.held_out, batch_size=self.batch_size)

    def transfer_batch_to_device(self, batch, device):
        return tuple(part.to(device) for part in batch)


class LitAutoEncoder(pl.LightningModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.example_input_array = torch.rand(2, 64)
        self.mse = pl.metrics.MeanSquaredError()

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        x_hat = self.decoder(self.encoder(x))
        self.log("val_mse", self.mse(x_hat, x))
        self.log("val_loss", F.mse_loss(x_hat, x))

    def test_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        self.log("test_loss", F.mse_loss(self.decoder(self.encoder(x)), x))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class PrintAndCount(pl.Callback):
    def __init__(self):
        self.batches = 0

    def on_init_end(self, trainer):
        print("ready")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        self.batches += 1

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        return {"batches": self.batches}

    def on_load_checkpoint(self, callback_state):
        self.batches = callback_state["batches"]


data = DigitsDataModule()
model = LitAutoEncoder()
counter = PrintAndCount()
trainer = pl.Trainer(
    gpus=torch.cuda.device_count(),
    accelerator="ddp",
    max_epochs=3,
    progress_bar_refresh_rate=20,
    precision=32,
    weights_summary="top",
    terminate_on_nan=True,
    logger=False,
    stochastic_weight_avg=False,
    flush_logs_every_n_steps=100,
    callbacks=[
        counter,
        EarlyStopping(monitor="val_loss"),
        ModelCheckpoint(monitor="val_loss", every_n_val_epochs=1),
        GPUStatsMonitor(),
    ],
)
trainer.fit(model, data)
before, after = [r["test_loss"] for m in (LitAutoEncoder(), model) for r in trainer.test(m, datamodule=data)]

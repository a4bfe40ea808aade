import engine as L
import torch
import torch.nn.functional as F
import torchmetrics
from drawn_digits import digits
from engine.callbacks import Callback, EarlyStopping, ModelCheckpoint
from engine.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Subset


class DigitsData(L.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str):
        # 訓練用と検証用に分割する
        self.everything = digits(384)

    def loader(self, start, stop, shuffle=False):
        return DataLoader(Subset(self.everything, range(start, stop)), self.hparams.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(0, 256, shuffle=True)

    def val_dataloader(self):
        return self.loader(256, 320)

    def test_dataloader(self):
        return self.loader(320, 384)

    def predict_dataloader(self):
        return self.loader(320, 384)


class LitModel(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.validation_step_outputs = []
        self.history = []

    def _shared_step(self, batch):
        x, y = batch
        logits = self.model(x)
        return F.cross_entropy(logits, y), logits, y

    def training_step(self, batch, batch_idx):
        loss, logits, y = self._shared_step(batch)
        self.train_acc(logits, y)
        self.log("train_loss", loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, logits, y = self._shared_step(batch)
        self.val_acc.update(logits, y)
        self.log_dict({"val_loss": loss, "val_acc": self.val_acc}, prog_bar=True)
        self.validation_step_outputs.append(loss)
        return loss

    def on_validation_epoch_end(self):
        # エポック終了時に出力をまとめる
        self.history.append(torch.stack(self.validation_step_outputs).mean().item())
        self.validation_step_outputs.clear()

    def test_step(self, batch, batch_idx):
        loss, logits, y = self._shared_step(batch)
        self.log("test_acc", (logits.argmax(1) == y).float().mean())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.model(batch[0]).argmax(1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MyPrintingCallback(Callback):
    def on_train_start(self, trainer, pl_module):
        print("訓練を開始します")

    def on_train_end(self, trainer, pl_module):
        print("訓練が終わりました")


L.seed_everything(1234)
data, model = DigitsData(), LitModel()
checkpoint = ModelCheckpoint(monitor="val_loss", mode="min", save_last=True)
trainer = L.Trainer(
    max_epochs=4,
    accelerator="cpu",
    devices="auto",
    logger=CSVLogger("logs", name="digits"),
    gradient_clip_val=1.0,
    accumulate_grad_batches=2,
    val_check_interval=0.5,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[checkpoint, EarlyStopping(monitor="val_loss", patience=5), MyPrintingCallback()],
)
trainer.fit(model, datamodule=data)
results = trainer.test(ckpt_path="best", datamodule=data)
best = LitModel.load_from_checkpoint(checkpoint.best_model_path)
predictions = torch.cat(trainer.predict(best, datamodule=data))

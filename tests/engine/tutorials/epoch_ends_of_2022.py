import engine as pl
import torch
import torch.nn.functional as F
from drawn_digits import digits
from engine.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from engine.utilities.types import EPOCH_OUTPUT, STEP_OUTPUT
from torch import nn
from torch.utils.data import DataLoader


class 数字分类器(pl.LightningModule):
    """用于识别数字的简单卷积网络。"""

    def __init__(self, 学习率: float = 2e-2, n_classes: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, n_classes)
        )
        self.记录 = {"train": [], "val": [], "test": []}

    def forward(self, x):
        return self.net(x.unsqueeze(1))

    # 训练：每个批次返回损失和预测
    def training_step(self, batch, batch_idx) -> STEP_OUTPUT:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "correct": (logits.argmax(dim=1) == y).sum(), "n": len(y)}

    def training_epoch_end(self, outputs: EPOCH_OUTPUT) -> None:
        # 汇总整个 epoch 的结果
        avg_loss = torch.stack([o["loss"] for o in outputs]).mean()
        acc = sum(o["correct"] for o in outputs) / sum(o["n"] for o in outputs)
        self.log("avg_train_loss", avg_loss)
        self.log("train_acc", acc)
        self.记录["train"].append((avg_loss.item(), float(acc)))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"logits": self(x), "y": y}

    def validation_step_end(self, outputs):
        return F.cross_entropy(outputs["logits"], outputs["y"]), outputs["logits"].argmax(1), outputs["y"]

    def validation_epoch_end(self, outputs):
        losses, preds, targets = zip(*outputs, strict=True)
        self.log("val_loss", torch.stack(losses).mean(), prog_bar=True)
        self.log("val_acc", (torch.cat(preds) == torch.cat(targets)).float().mean())

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        return (self(x).argmax(1) == y).float().mean()

    def test_epoch_end(self, outputs):
        # 两个测试集
        for i, part in enumerate(outputs):
            self.log(f"test_acc_{i}", torch.stack(part).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.学习率)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "frequency": 1}}


class Печать(pl.Callback):
    """Печатает метрики после каждой эпохи."""

    def __init__(self):
        self.lines = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, unused=0):
        self.last = outputs["loss"]

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.lines.append(f"эпоха {trainer.current_epoch}: {trainer.callback_metrics['val_acc']:.2f}")


pl.seed_everything(42, workers=True)
model, печать = 数字分类器(), Печать()
trainer = pl.Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=4,
    precision=32,
    log_every_n_steps=2,
    enable_progress_bar=False,
    callbacks=[
        печать,
        LearningRateMonitor(logging_interval="epoch"),
        ModelCheckpoint(monitor="val_acc", mode="max", filename="{epoch}-{val_acc:.2f}"),
        EarlyStopping("val_loss", patience=3),
    ],
)
trainer.fit(model, DataLoader(digits(256), batch_size=32, shuffle=True), DataLoader(digits(64, 1), batch_size=32))
results = trainer.test(
    model, dataloaders=[DataLoader(digits(64, 2), 32), DataLoader(digits(64, 3), 32)], ckpt_path="best"
)

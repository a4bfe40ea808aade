from argparse import ArgumentParser

import engine as pl
import torch
from drawn_digits import digits
from engine.callbacks import EarlyStopping, LearningRateLogger, ModelCheckpoint
from engine.core.lightning import LightningModule
from engine.metrics.functional import accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class LitClassifier(LightningModule):
    def __init__(self, hidden_dim=32, learning_rate=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        result = pl.TrainResult(minimize=loss)
        result.log("train_loss", loss, on_epoch=True)
        return result

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        result = pl.EvalResult(checkpoint_on=F.cross_entropy(y_hat, y))
        result.log("val_acc", accuracy(y_hat, y))
        return result

    def on_epoch_end(self):
        self.epochs = self.current_epoch + 1

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return [optimizer], [scheduler]

    @staticmethod
    def add_model_specific_args(parent_parser):
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument("--learning_rate", type=float, default=1e-2)
        return parser


parser = ArgumentParser()
parser = pl.Trainer.add_argparse_args(parser)
parser = LitClassifier.add_model_specific_args(parser)
args = parser.parse_args(["--max_epochs", "3", "--learning_rate", "0.02"])

model = LitClassifier(learning_rate=args.learning_rate)
checkpoint = ModelCheckpoint(
    filepath="checkpoints/digits-{epoch}", monitor="val_loss", period=1, save_top_k=1, prefix=""
)
trainer = pl.Trainer.from_argparse_args(
    args,
    checkpoint_callback=checkpoint,
    early_stop_callback=EarlyStopping("val_loss"),
    gpus=0,
    callbacks=[LearningRateLogger(), checkpoint],
    progress_bar_refresh_rate=0,
    reload_dataloaders_every_epoch=False,
)
trainer.fit(
    model, train_dataloader=DataLoader(digits(256), 32, shuffle=True), val_dataloaders=DataLoader(digits(64, 1), 32)
)

import os
from argparse import Namespace
from collections import OrderedDict

import engine as pl
import torch
from drawn_digits import digits
from torch.nn import functional as F
from torch.utils.data import DataLoader


class DigitSystem(pl.LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.hparams = hparams
        self.l1 = torch.nn.Linear(8 * 8, hparams.hidden)
        self.l2 = torch.nn.Linear(hparams.hidden, 10)
        self.history = []

    def forward(self, x):
        return self.l2(torch.relu(self.l1(x.view(x.size(0), -1))))

    def training_step(self, batch, batch_nb):
        x, y = batch
        loss = F.cross_entropy(self.forward(x), y)
        tqdm_dict = {"train_loss": loss}
        output = OrderedDict({"loss": loss, "progress_bar": tqdm_dict, "log": tqdm_dict})
        return output

    def validation_step(self, batch, batch_nb):
        x, y = batch
        y_hat = self.forward(x)
        return {"val_loss": F.cross_entropy(y_hat, y), "correct": (y_hat.argmax(1) == y).float().mean()}

    def validation_end(self, outputs):
        avg_loss = torch.stack([x["val_loss"] for x in outputs]).mean()
        avg_acc = torch.stack([x["correct"] for x in outputs]).mean()
        self.history.append(avg_acc.item())
        tensorboard_logs = {"val_loss": avg_loss, "val_acc": avg_acc}
        return {"val_loss": avg_loss, "log": tensorboard_logs}

    def configure_optimizers(self):
        return [torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)]

    @pl.data_loader
    def tng_dataloader(self):
        return DataLoader(digits(256), batch_size=self.hparams.batch_size, shuffle=True)

    @pl.data_loader
    def val_dataloader(self):
        return DataLoader(digits(64, seed=1), batch_size=self.hparams.batch_size)


args = Namespace(hidden=32, learning_rate=1e-2, batch_size=32)
model = DigitSystem(args)
trainer = pl.Trainer(
    default_save_path=os.getcwd(),
    max_nb_epochs=3,
    row_log_interval=2,
    weights_summary=None,
    early_stop_callback=False,
    show_progress_bar=False,
    gradient_clip=0.5,
)
trainer.fit(model)

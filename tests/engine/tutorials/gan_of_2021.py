import engine as pl
import torch
from drawn_digits import digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class DigitGAN(pl.LightningModule):
    def __init__(self, latent_dim: int = 4, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(nn.Linear(latent_dim, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (8, 8)))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, z):
        return self.generator(z)

    def cheated(self, scores, wanted):
        return F.binary_cross_entropy_with_logits(scores, wanted)

    def training_step(self, batch, batch_idx, optimizer_idx):
        images, _ = batch
        z = torch.randn(images.shape[0], self.hparams.latent_dim).type_as(images)
        real, fake = torch.ones(images.size(0), 1).type_as(images), torch.zeros(images.size(0), 1).type_as(images)
        # Draw digits that pass for real ones.
        if optimizer_idx == 0:
            g_loss = self.cheated(self.discriminator(self(z)), real)
            shown = {"g_loss": g_loss}
            return {"loss": g_loss, "progress_bar": shown, "log": shown}
        # Tell drawn digits from real ones.
        if optimizer_idx == 1:
            real_loss = self.cheated(self.discriminator(images), real)
            fake_loss = self.cheated(self.discriminator(self(z).detach()), fake)
            d_loss = (real_loss + fake_loss) / 2
            shown = {"d_loss": d_loss}
            return {"loss": d_loss, "progress_bar": shown, "log": shown}

    def optimizer_step(
        self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu, using_native_amp, using_lbfgs
    ):
        optimizer.step(closure=optimizer_closure)

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr)
        return [opt_g, opt_d], []


model = DigitGAN()
trainer = pl.Trainer(
    max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
)
trainer.fit(model, DataLoader(digits(256), batch_size=32))

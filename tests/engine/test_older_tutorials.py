"""Programs as tutorials of 2020 to 2024 had them: each trains and improves, or leads line by line to one that does.

They lie in `tutorials`; only their import is ours. Where they need changes, these are listed: what the message has, and
then, in turn, what stands in the program and what a reader writes instead.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine
import pytest
import torch

FOLDER = Path(__file__).parent / "tutorials"


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the programs import."""
    monkeypatch.syspath_prepend(FOLDER)


@contextmanager
def backward_passes() -> Iterator[list[int]]:
    """Counts them: a program that is refused has not trained on a single batch."""
    passes: list[int] = []
    backward = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "backward", lambda *args, **kwargs: (passes.append(1), backward(*args, **kwargs))[1]
        )
        yield passes


def run(program: str) -> dict[str, Any]:
    """Run a program in the current folder, as Python does; returns its names."""
    Path("program.py").write_text(program, encoding="utf-8")
    engine.seed_everything(7)
    return runpy.run_path("program.py")


def read(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def follow(name: str, changes: list[tuple[str, ...]]) -> dict[str, Any]:
    """Run a program, do what the message says, run it again, and so on until it runs through; returns its names."""
    program = read(name)
    for message, *edits in changes:
        with backward_passes() as passes, pytest.raises(engine.MisconfigurationException) as caught:
            run(program)
        line = str(caught.value)
        assert message in line and "\n" not in line and passes == [], line
        for old, new in zip(edits[::2], edits[1::2], strict=True):
            assert old in program, f"of no use: {old}"
            program = program.replace(old, new)
    return run(program)


def test_a_system_of_spring_2020() -> None:
    names = follow(
        "system_of_spring_2020",
        [
            ("engine.data_loader is not here; write the loader's hook without", "    @pl.data_loader\n", ""),
            ("default_save_path=...: write default_root_dir=", "default_save_path", "default_root_dir"),
            ("max_nb_epochs=3: write max_epochs=3", "max_nb_epochs=3", "max_epochs=3"),
            ("row_log_interval=2: write log_every_n_steps=2", "row_log_interval=2", "log_every_n_steps=2"),
            ("write enable_model_summary=False for none", "weights_summary=None", "enable_model_summary=False"),
            ("early_stop_callback=False: ", "    early_stop_callback=False,\n", ""),
            ("write enable_progress_bar=False", "show_progress_bar=False", "enable_progress_bar=False"),
            ("gradient_clip=0.5: write gradient_clip_val=0.5", "gradient_clip=0.5", "gradient_clip_val=0.5"),
            ("DigitSystem.validation_end would never be called: ", "def validation_end(", "def validation_epoch_end("),
            ("tng_dataloader would never be called: Module has no hook of that name; write train_d", "tng_", "train_"),
            (
                "validation_epoch_end returns a dict of 'val_loss', 'log'; log values by self.log(name, value)",
                '        return {"val_loss": avg_loss, "log": tensorboard_logs}\n',
                "        for name, value in tensorboard_logs.items():\n            self.log(name, value)\n",
            ),
            (
                "training_step returns a dict of 'loss', 'progress_bar', 'log'; log values by self.log(name, value)",
                "        return output\n",
                '        self.log("train_loss", loss, prog_bar=True)\n        return loss\n',
            ),
        ],
    )
    # The first is that of the sanity check.
    history = names["model"].history[1:]
    assert len(history) == 3 and history[-1] > 0.9 > history[0]
    assert names["model"].hparams.hidden == 32 and {"val_acc", "train_loss"} <= set(names["trainer"].callback_metrics)


EVAL_RESULT = """        result = pl.EvalResult(checkpoint_on=F.cross_entropy(y_hat, y))
        result.log("val_acc", accuracy(y_hat, y))
        return result
"""
LOGGED = """        self.log("val_loss", F.cross_entropy(y_hat, y))
        self.log("val_acc", accuracy(y_hat, y, task="multiclass", num_classes=10))
"""
TRAIN_RESULT = """        result = pl.TrainResult(minimize=loss)
        result.log("train_loss", loss, on_epoch=True)
        return result
"""
LOSS = """        self.log("train_loss", loss, on_epoch=True)
        return loss
"""


def test_results_of_summer_2020() -> None:
    names = follow(
        "results_of_summer_2020",
        [
            (
                "callbacks.LearningRateLogger is not here; write LearningRateMonitor",
                "RateLogger",
                "RateMonitor",
            ),
            (
                "functional.accuracy is not here; write torchmetrics.functional",
                "engine.metrics.",
                "torchmetrics.",
            ),
            (
                'Trainer.add_argparse_args is not here; write parser.add_argument("--max_epochs", type=int)',
                "parser = pl.Trainer.add_argparse_args(parser)",
                'parser.add_argument("--max_epochs", type=int)',
            ),
            ('filename="name-{epoch}"', 'filepath="checkpoints/', 'dirpath="checkpoints", filename="'),
            ("period=1: write every_n_epochs=1", "period=1", "every_n_epochs=1"),
            ("prefix='': write dirpath=", ', prefix=""', ""),
            (
                "Trainer.from_argparse_args is not here; write parser",
                "pl.Trainer.from_argparse_args(\n    args,",
                "pl.Trainer(\n    max_epochs=args.max_epochs,",
            ),
            ("or callbacks=[ModelCheckpoint(...)]", "    checkpoint_callback=checkpoint,\n", ""),
            ("early_stop_callback=...: write", '    early_stop_callback=EarlyStopping("val_loss"),\n', ""),
            ('gpus=0: write accelerator="gpu", devices=0', "gpus=0", 'accelerator="cpu"'),
            ("enable_progress_bar=False for none", "progress_bar_refresh_rate=0", "enable_progress_bar=False"),
            ("reload_dataloaders_every_epoch=False: write", "    reload_dataloaders_every_epoch=False,\n", ""),
            (
                "fit has no argument train_dataloader=...: write train_dataloaders=",
                "train_dataloader=",
                "train_dataloaders=",
            ),
            ("on_epoch_end would never be called: ", "on_epoch_end(self)", "on_train_epoch_end(self)"),
            ("engine.EvalResult is not here; log by self.log(name, value)", EVAL_RESULT, LOGGED),
            ("engine.TrainResult is not here; log by self.log(name, value), and return", TRAIN_RESULT, LOSS),
        ],
    )
    assert names["trainer"].callback_metrics["val_acc"] > 0.9
    assert names["model"].epochs == 3 and names["model"].hparams.learning_rate == 0.02
    assert len(list(Path("checkpoints").glob("digits-*.ckpt"))) == 1


def test_an_autoencoder_of_2021() -> None:
    names = follow(
        "autoencoder_of_2021",
        [
            ("GPUStatsMonitor is not here; log torch.cuda", "GPUStatsMonitor, ", "", "GPUStatsMonitor(),", ""),
            (
                "DataModule has no argument train_transforms=None: set it in an __init__ of your own; and no ",
                "train_transforms=None, val_transforms=None, dims=(1, 8, 8)",
                "",
            ),
            (
                "metrics.MeanSquaredError is not here; write torchmetrics.Mean",
                "pl.metrics",
                "torchmetrics",
                "import torch\n",
                "import torch\nimport torchmetrics\n",
            ),
            ("every_n_val_epochs=1: write every_n_epochs=1", "every_n_val_epochs", "every_n_epochs"),
            ('gpus=0: write accelerator="gpu"', "    gpus=torch.cuda.device_count(),\n", ""),
            ("progress_bar_refresh_rate=20: write", "progress_bar_refresh_rate=20", "enable_progress_bar=False"),
            ("weights_summary='top': write", 'weights_summary="top"', "enable_model_summary=False"),
            ("terminate_on_nan=True: leave it out", "    terminate_on_nan=True,\n", ""),
            ("stochastic_weight_avg=False: write callbacks=[Stoch", "    stochastic_weight_avg=False,\n", ""),
            ("flush_logs_every_n_steps=100: leave it out; log_every", "    flush_logs_every_n_steps=100,\n", ""),
            ("accelerator='ddp' is of older versions; write accelerator=", 'accelerator="ddp"', 'accelerator="cpu"'),
            (
                "PrintAndCount.on_init_end would never be called: Callback has no hook of that name; write setup",
                "def on_init_end(self, trainer)",
                "def setup(self, trainer, pl_module, stage)",
            ),
            (
                "PrintAndCount.on_load_checkpoint takes (callback_state); write def on_load_checkpoint(self, trainer, "
                "pl_module, checkpoint); instead of callback_state, write load_state_dict(self, state_dict)",
                "def on_load_checkpoint(self, callback_state)",
                "def load_state_dict(self, callback_state)",
            ),
            (
                "PrintAndCount.on_save_checkpoint returns a state; write state_dict(self), which returns it",
                "def on_save_checkpoint(self, trainer, pl_module, checkpoint)",
                "def state_dict(self)",
            ),
            (
                "PrintAndCount.on_train_batch_end takes (trainer, pl_module, outputs, batch, batch_idx, data",
                "outputs, batch, batch_idx, dataloader_idx)",
                "outputs, batch, batch_idx)",
            ),
            (
                "DigitsDataModule.transfer_batch_to_device takes (batch, device); write def transfer_batch_to_device(",
                "def transfer_batch_to_device(self, batch, device)",
                "def transfer_batch_to_device(self, batch, device, dataloader_idx)",
            ),
            (
                "LitAutoEncoder.validation_step takes (batch, batch_idx, dataloader_idx), but there is one loader",
                "batch, batch_idx, dataloader_idx):\n        x, _ = batch\n",
                "batch, batch_idx, dataloader_idx=0):\n        x, _ = batch\n",
            ),
        ],
    )
    assert names["after"] < 0.6 * names["before"] and names["counter"].batches == 24


BY_HAND = """        g, d = self.optimizers()
        self.toggle_optimizer(g)
        g_loss = self.cheated(self.discriminator(self(z)), real)
        self.log("g_loss", g_loss, prog_bar=True)
        g.zero_grad()
        self.manual_backward(g_loss)
        g.step()
        self.untoggle_optimizer(g)
        real_loss = self.cheated(self.discriminator(images), real)
        fake_loss = self.cheated(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        d.zero_grad()
        self.manual_backward(d_loss)
        d.step()

"""


def test_a_gan_of_2021() -> None:
    before, _, rest = read("gan_of_2021").partition("        # Draw digits")
    step, _, rest = rest.partition("    def optimizer_step(")
    hook, _, _ = rest.partition("    def configure_optimizers(")
    names = follow(
        "gan_of_2021",
        [
            (
                "DigitGAN.optimizer_step takes (epoch, batch_idx, optimizer, optimizer_idx, opt",
                f"    def optimizer_step({hook}",
                "",
            ),
            (
                "DigitGAN.training_step takes (batch, batch_idx, optimizer_idx); write def training_step(self, batch, "
                "batch_idx); instead of optimizer_idx, set self.automatic_optimization = False, and in training_step",
                "training_step(self, batch, batch_idx, optimizer_idx)",
                "training_step(self, batch, batch_idx)",
                f"        # Draw digits{step}",
                BY_HAND,
            ),
            (
                "configure_optimizers returned 2 optimizers; set self.automatic_optimization = False in __init__",
                "        self.save_hyperparameters()\n",
                "        self.save_hyperparameters()\n        self.automatic_optimization = False\n",
            ),
        ],
    )
    trainer, model = names["trainer"], names["model"]
    assert trainer.global_step == 2 * 4 * 8 and {"g_loss", "d_loss"} <= set(trainer.callback_metrics)
    # The generator, whose first drawings are dark, has learned how bright digits are.
    assert model(torch.randn(64, 4)).mean() > 0.2


def test_epoch_ends_of_2022_run_as_they_are() -> None:
    names = run(read("epoch_ends_of_2022"))
    losses, accuracies = zip(*names["model"].记录["train"], strict=True)
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0] and accuracies[-1] > 0.9
    assert [line.split(":")[0] for line in names["печать"].lines] == [f"эпоха {n}" for n in range(4)]
    first, second = names["results"]
    assert first["test_acc_0"] > 0.9 and first == second


def test_step_outputs_of_2024_run_as_they_are() -> None:
    names = run(read("step_outputs_of_2024"))
    history = names["model"].history[1:]
    assert len(history) == 8 and history[-1] < 0.5 * history[0]
    assert names["results"][0]["test_acc"] > 0.9
    right = torch.tensor([names["data"].everything[i][1] for i in range(320, 384)]) == names["predictions"]
    torch.testing.assert_close(right.float().mean().item(), names["results"][0]["test_acc"])

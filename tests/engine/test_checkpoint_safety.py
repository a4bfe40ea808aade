"""What saving and resuming must never do: touch foreign files, lose a good one, grow, or mix up weights."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import checkpoint
from engine.callbacks import EMAWeightAveraging, ModelCheckpoint
from engine.checkpoint_writer import CheckpointWriter
from engine.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from toy import Net, loader, same_bits, trainer


def test_a_checkpoint_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.ckpt"
    thesis.write_text("years of work")
    saver = ModelCheckpoint("c", "best", monitor="val_loss")
    run = trainer(callbacks=saver, enable_checkpointing=True)
    run.fit(Net(), loader(), loader())
    (tmp_path / "c/link.ckpt").symlink_to(thesis)
    content = torch.load("c/best.ckpt", weights_only=True)
    names = ["../thesis.ckpt", str(thesis), "link.ckpt", "sub/../../thesis.ckpt"]
    content["callbacks"][saver.state_key]["best_k_models"] = dict.fromkeys(names, 1e9)
    torch.save(content, "c/evil.ckpt")
    again = ModelCheckpoint("c", "best", monitor="val_loss")
    trainer(callbacks=again, enable_checkpointing=True, max_epochs=3).fit(
        Net(), loader(), loader(), ckpt_path="c/evil.ckpt"
    )
    assert thesis.read_text() == "years of work"
    assert [Path(path).name for path in again.best_k_models] == ["best.ckpt"]


@pytest.mark.filterwarnings("ignore:.*looking for an older one")
def test_after_a_fall_back_no_damaged_file_is_kept_in_place_of_a_good_one() -> None:
    class Looks(engine.Callback):
        seen = 0

        def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            files = [*Path("c").glob("*.ckpt")]
            if trainer.current_epoch > 2:
                type(self).seen = len([checkpoint.load(file) for file in files])

    class Dies(engine.Callback):
        def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks: Any, **options: Any) -> None:
        saver = ModelCheckpoint("c", save_top_k=0, save_last=True)
        part = trainer(callbacks=[*callbacks, saver], enable_checkpointing=True, max_epochs=4)
        part.fit(Net(), loader(), **options)

    with pytest.raises(KeyboardInterrupt):
        run(Dies())
    content = Path("c/last.ckpt").read_bytes()
    Path("c/last.ckpt").unlink()
    Path("c/last.ckpt").write_bytes(content[:-1000])
    run(Looks(), ckpt_path="auto")
    assert Looks.seen == 2


def test_weights_that_layers_share_are_averaged_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
            self.net[2].weight = self.net[0].weight

    class Compares(engine.Callback):
        before: Any = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert same_bits(dict(pl_module.state_dict()), self.before)

    model = Tied()
    part = trainer(callbacks=[EMAWeightAveraging(decay=0.5), Compares()], max_epochs=2)
    part.fit(model, loader(), loader())
    assert model.net[2].weight is model.net[0].weight
    part.save_checkpoint("a.ckpt")
    state = torch.load("a.ckpt", weights_only=True)
    assert torch.equal(state["state_dict"]["net.0.weight"], state["state_dict"]["net.2.weight"])


def test_a_run_with_averages_is_not_resumed_without_them() -> None:
    part = trainer(callbacks=EMAWeightAveraging())
    part.fit(Net(), loader())
    part.save_checkpoint("a.ckpt")
    with pytest.raises(
        engine.MisconfigurationException, match="averages of the weights; resume with EMAWeightAveraging"
    ):
        trainer(max_epochs=2).fit(Net(), loader(), ckpt_path="a.ckpt")
    trainer().test(Net(), loader(), ckpt_path="a.ckpt", verbose=False)


def test_time_that_runs_out_after_the_last_step_still_leaves_a_checkpoint() -> None:
    class Slow(Net):
        def on_validation_epoch_start(self) -> None:
            time.sleep(1.1)

    part = trainer(max_time="00:00:00:01", max_steps=3, enable_checkpointing=True, callbacks=ModelCheckpoint("c"))
    part.fit(Slow(), loader(), loader())
    assert checkpoint.load(Path("c/last.ckpt"))["global_step"] == 3


def test_logs_of_another_run_are_left_alone() -> None:
    class Saves(engine.Callback):
        def on_train_batch_end(self, trainer: engine.Trainer, *args: Any) -> None:
            trainer.save_checkpoint("a.ckpt")

    def run(name: str, epochs: int, lr: float, **options: Any) -> None:
        loggers = [TensorBoardLogger(".", name, "v"), CSVLogger(".", name, "v")]
        part = trainer(logger=loggers, log_every_n_steps=1, max_epochs=epochs, callbacks=Saves())
        part.fit(Net(lr), loader(), **options)

    run("other", 5, 0.05)
    Path("other/v/events.out.tfevents.mine").write_text("mine")
    rows, events = Path("other/v/metrics.csv").read_text(), {*Path("other/v").glob("events*")}
    run("own", 1, 0.1)
    run("other", 2, 0.1, ckpt_path="a.ckpt")
    assert Path("other/v/metrics.csv").read_text().startswith(rows)
    assert {*Path("other/v").glob("events*")} > events


def test_the_extra_state_of_a_module_comes_back() -> None:
    class Extra(Net):
        def __init__(self) -> None:
            super().__init__()
            self.note: Any = {"calls": 0}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note["calls"] += 1
            return super().training_step(batch, batch_idx)

        def get_extra_state(self) -> Any:
            return dict(self.note)

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    part = trainer(callbacks=EMAWeightAveraging(decay=0.5))
    part.fit(Extra(), loader())
    part.save_checkpoint("a.ckpt")
    again = Extra()
    trainer(callbacks=EMAWeightAveraging(decay=0.5), max_epochs=2).fit(again, loader(), ckpt_path="a.ckpt")
    assert again.note == {"calls": 8}


def test_saving_in_the_background_needs_memory_for_one_checkpoint() -> None:
    writer = CheckpointWriter(asynchronous=True)
    for number in range(1, 6):
        # Before the weights comes a state of more and more tensors.
        state = {"state": [torch.zeros(3)] + [torch.ones(2) for _ in range(number)], "weights": torch.zeros(1000)}
        writer.write({**state, "state_dict": {}}, Path("a.ckpt"), None, lambda: None)
        writer.wait()
        kept = sum(buffer.numel() for buffers in writer._buffers.values() for buffer in buffers)
        assert kept == 1000 + 3 + 2 * number


def test_a_bomb_under_a_name_in_capitals_is_refused_as_well() -> None:
    cases = {"allows; refused": ["ref/DATA.PKL"], "a record is there twice": ["ref/data.pkl", "ref/Data.pkl"]}
    for fault, names in cases.items():
        with zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                archive.writestr(name, _bomb())
            archive.writestr("ref/version", "3\n")
            for info in archive.infolist():
                info.external_attr = 0
        with pytest.raises(engine.MisconfigurationException, match=fault):
            checkpoint.load(Path("bomb.ckpt"))


def _bomb() -> bytes:
    """A pickle of a mapping whose key is a tuple of tuples: to hash it takes 2 ** 45 steps."""
    # Each round puts the object into the memo (q), and makes a tuple (\x86) of it (h) twice.
    body = b"K\x01" + b"".join(b"q%c0h%ch%c\x86" % ((number,) * 3) for number in range(45))
    return b"\x80\x02}" + body + b"K\x01s."


def test_weights_that_a_hook_leaves_out_of_the_file_are_not_missed() -> None:
    class Leaves(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]["net.bias"]

    part = trainer(callbacks=ModelCheckpoint("c", save_last=True), enable_checkpointing=True)
    part.fit(Leaves(), loader())
    assert set(checkpoint.load(Path("c/last.ckpt"))["state_dict"]) == {"net.weight"}


@pytest.mark.parametrize("filename", ["last", "previous"])
def test_names_that_the_callback_needs_itself_are_refused(filename: str) -> None:
    with pytest.raises(engine.MisconfigurationException, match="is the name of another file"):
        ModelCheckpoint(filename=filename)


def test_of_two_callbacks_in_one_folder_either_keeps_the_file_of_the_other() -> None:
    class Looks(engine.Callback):
        steps: list[set[int]] = []

        def on_train_epoch_start(self, trainer: engine.Trainer, pl_module: engine.Module) -> None:
            self.steps.append({checkpoint.load(file)["global_step"] for file in Path("c").glob("*.ckpt")})

    best = ModelCheckpoint("c", "best", monitor="val_loss", save_last=True)
    often = ModelCheckpoint("c", save_top_k=0, save_last=True, every_n_train_steps=3)
    part = trainer(callbacks=[best, often, Looks()], enable_checkpointing=True, max_epochs=2)
    part.fit(Net(), loader(), loader())
    assert Looks.steps == [set(), {3, 4}]

"""One checkpoint file: its schema, that it is whole or not there, and that no damage gets past `load`."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import torch
from engine import checkpoint
from torch import nn
from toy import Net, Steps, fit, loader, same_bits, trainer, weights

WEIGHTS_ONLY = {
    *("format", "epoch", "global_step", "state_dict", "hyper_parameters", "datamodule_hyper_parameters", "env"),
    *("hparams_name", "datamodule_hparams_name", "pytorch-lightning_version"),
}
TRAINING = {"optimizer_states", "lr_schedulers", "precision", "gradients", "callbacks", "datamodule", "state", "order"}
TRAINING |= {"meters", "metrics", "evaluation_steps", "loggers", "rng", "loaders"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one epoch."""
    path = tmp_path / "a.ckpt"
    fit(Net()).save_checkpoint(path)
    return path


def refusal(action: Callable[[], Any]) -> str:
    """The message of the MisconfigurationException that `action` raises, which is one line."""
    with pytest.raises(engine.MisconfigurationException) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_the_keys_are_those_of_the_documented_schema(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert set(content) == WEIGHTS_ONLY | TRAINING
    assert all(key in (checkpoint.__doc__ or "") for key in content)
    assert (content["format"], content["epoch"], content["global_step"]) == (4, 1, 4)
    position = {"seed": 1, "epoch": 1, "batches_done": 0, "samples_done": 0, "total_batches": 4, "global_step": 4}
    position |= {"batches_that_stepped": 4, "last_batch": True}
    open_ends = ("step_open", "plateau_open", "validated", "epoch_over", "should_stop")
    assert content["state"] == position | dict.fromkeys(open_ends, False)
    assert content["hyper_parameters"] == {"lr": 0.1}
    assert set(content["env"]) == {"torch", "python", "world_size"}
    assert set(content["state_dict"]) == {"net.weight", "net.bias"}
    assert len(content["rng"]) == len(content["optimizer_states"]) == 1


def test_weights_only_leaves_out_what_training_needs(tmp_path: Path) -> None:
    run = fit(Net())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert set(torch.load("w.ckpt", weights_only=True)) == WEIGHTS_ONLY
    model = Net()
    trainer().test(model, loader(), ckpt_path="w.ckpt", verbose=False)
    assert weights(model).equal(weights(run.module))
    assert "weights only; it can be tested, not resumed" in refusal(
        lambda: trainer().fit(Net(), loader(), ckpt_path="w.ckpt")
    )


def test_hooks_may_add_plain_values_and_nothing_else(tmp_path: Path) -> None:
    class Adds(Net):
        extra: Any = {"vocabulary": ["a", "b"], "mean": torch.ones(2)}

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["extra"] = self.extra

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint["extra"]

    run = fit(model := Adds())
    run.save_checkpoint("a.ckpt")
    run.test(model, loader(), ckpt_path="a.ckpt", verbose=False)
    assert same_bits(model.loaded, Adds.extra)
    model.extra = {"path": [Path("x")]}
    assert "extra['path'][0] is a PosixPath; save primitives" in refusal(lambda: run.save_checkpoint("b.ckpt"))
    assert not Path("b.ckpt").exists()


@pytest.mark.parametrize("broken", ["torch.save", "os.replace", "os.fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    saved: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fails(*args: Any, **kwargs: Any) -> None:
        if broken == "torch.save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(broken, fails)
        with pytest.raises(OSError, match="No space left"):
            fit(Net(lr=0.5)).save_checkpoint(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["a.ckpt"]


def test_a_write_that_was_killed_is_no_checkpoint(saved: Path) -> None:
    # What a killed process leaves behind has another name, and is not listed as a checkpoint either.
    (saved.parent / "b.ckpt.tmp-123").write_bytes(b"half")
    assert "b.ckpt.tmp" not in refusal(lambda: checkpoint.load(saved.parent / "b.ckpt"))


def test_saving_makes_the_folders_and_replaces_the_file(tmp_path: Path) -> None:
    run, path = fit(Net()), tmp_path / "x" / "y" / "a.ckpt"
    run.save_checkpoint(path)
    run.save_checkpoint(path)
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_a_flipped_byte_anywhere_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    content, good = saved.read_bytes(), checkpoint.load(saved)
    path, refused = tmp_path / "flipped.ckpt", 0
    offsets = range(0, len(content), 11)
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)
        except engine.MisconfigurationException as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            # The padding and time stamps between the records carry no checksum and no data.
            assert same_bits(loaded, good)
    assert refused > len(offsets) / 2


def test_a_flipped_byte_in_any_record_is_refused_by_the_records_name(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "flipped.ckpt"
    with zipfile.ZipFile(saved) as archive:
        records = [info for info in archive.infolist() if info.file_size]
    for info in records:
        # The name and an extra field, of these sizes, lie between a record's header and its data.
        sizes = struct.unpack_from("<HH", content, info.header_offset + 26)
        start = info.header_offset + 30 + sum(sizes)
        for offset in {start, start + info.file_size // 2, start + info.file_size - 1}:
            damaged = bytearray(content)
            damaged[offset] ^= 0x10
            path.write_bytes(damaged)
            message = refusal(lambda: checkpoint.load(path))
            assert "is damaged" in message and info.filename in message
            assert "use another one" in message


@pytest.mark.parametrize("field", [10, 38], ids=["compression", "folder"])
def test_bits_without_a_checksum_that_would_change_a_tensor_are_refused(field: int, saved: Path) -> None:
    # Told that a record is a folder, torch.load returns memory that nobody has written to.
    content = bytearray(saved.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + field] ^= 0x10 if field == 38 else 0x08
    saved.write_bytes(content)
    assert "archive/data/0" in refusal(lambda: checkpoint.load(saved))


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "short.ckpt"
    for length in [*range(0, 70), *range(70, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        assert str(path) in refusal(lambda: checkpoint.load(path))


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("kind", ["zip", "bare", "inside"])
def test_a_hostile_file_is_refused_without_running_it(kind: str, saved: Path) -> None:
    if kind == "bare":
        saved.write_bytes(pickle.dumps(Hostile()))
    else:
        content = torch.load(saved, weights_only=True) if kind == "inside" else {}
        torch.save({**content, "format": 1, "callbacks": {"x": Hostile()}}, saved)
    message = refusal(lambda: checkpoint.load(saved))
    assert str(saved) in message
    assert kind == "bare" or "could run code when loaded, and was refused" in message
    assert not Path("executed").exists()


def zip_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


OTHER_FILES = {
    "text": b"hello\nworld\n",
    "empty": b"",
    "zip": zip_of("readme.txt", b"hello"),
    "encrypted-looking": b"PK\x03\x04" + b"\0" * 100,
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_any_other_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(OTHER_FILES[kind])
    assert str(path) in refusal(lambda: checkpoint.load(path))


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"format": 3}, [1], torch.ones(2), {"format": "1"}])
def test_what_another_program_saved_with_torch_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, path := tmp_path / "x.ckpt")
    assert "not a checkpoint of this engine" in refusal(lambda: checkpoint.load(path))


def test_a_missing_file_lists_those_there_are(saved: Path, tmp_path: Path) -> None:
    message = refusal(lambda: checkpoint.load(tmp_path / "b.ckpt"))
    assert "b.ckpt does not exist" in message and f"there are: {saved}" in message
    assert "there are no *.ckpt files" in refusal(lambda: checkpoint.load(tmp_path / "none" / "b.ckpt"))
    assert "does not exist" in refusal(lambda: checkpoint.load(tmp_path))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_entry_point_refuses_a_bad_file(stage: str, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-30])
    refusal(lambda: getattr(trainer(), stage)(Net(), loader(), ckpt_path=saved))
    refusal(lambda: Net.load_from_checkpoint(saved))


@pytest.mark.parametrize(
    ("net", "faults"),
    [
        (nn.Linear(3, 2), ["other shapes: net.weight [1, 3] in the file, [2, 3] in the model", "net.bias [1]"]),
        (nn.Linear(3, 1, bias=False), ["unknown to the model: net.bias"]),
        (nn.Sequential(nn.Linear(3, 1)), ["missing in the file: net.0.weight, net.0.bias", "unknown to the model"]),
        (nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)]), ["net.0.weight", "and 14 more"]),
    ],
)
def test_a_checkpoint_of_another_model_names_what_differs(net: nn.Module, faults: list[str], saved: Path) -> None:
    model = Steps()
    model.net = net
    before = weights(model)
    message = refusal(lambda: trainer().validate(model, loader(), ckpt_path=saved))
    assert all(fault in message for fault in [str(saved), "of another model", *faults])
    assert weights(model).equal(before)


def test_load_from_checkpoint_builds_the_model_with_its_arguments(tmp_path: Path) -> None:
    run = fit(Net(lr=0.25))
    run.save_checkpoint("a.ckpt")
    model = Net.load_from_checkpoint("a.ckpt")
    assert model.lr == model.hparams.lr == 0.25 and weights(model).equal(weights(run.module))
    assert Net.load_from_checkpoint("a.ckpt", lr=0.5).hparams == {"lr": 0.5}


def test_best_and_last_without_any_are_refused() -> None:
    for name in ("best", "last"):
        run = trainer(enable_checkpointing=True)
        message = refusal(lambda name=name, run=run: run.validate(Net(), loader(), ckpt_path=name))
        assert f"ckpt_path='{name}'" in message and "give the path of a file" in message


def test_subclasses_of_plain_types_are_saved_as_their_base(tmp_path: Path) -> None:
    class Shaped(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch))]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["shape"] = torch.ones(2, 3).shape

    fit(Shaped()).save_checkpoint("a.ckpt")
    loaded = torch.load("a.ckpt", weights_only=True)
    assert type(loaded["shape"]) is tuple and loaded["shape"] == (2, 3)
    assert type(loaded["optimizer_states"][0]["param_groups"][0]["lr"]) is float


@pytest.mark.parametrize("missing", ["state_dict", "hyper_parameters", "optimizer_states", "rng", "state"])
def test_a_file_that_lacks_a_part_is_refused(missing: str, saved: Path) -> None:
    parts = torch.load(saved, weights_only=True)
    del parts[missing]
    torch.save(parts, "part.ckpt")
    resume = functools.partial(trainer(max_epochs=3).fit, Net(), loader(), ckpt_path="part.ckpt")
    assert "part.ckpt" in refusal(resume)


def test_a_copied_module_leaves_the_trainer_behind() -> None:
    fit(model := Net())
    copied = copy.deepcopy(model)
    assert torch.equal(weights(copied), weights(model))
    with pytest.raises(engine.MisconfigurationException, match="not attached"):
        _ = copied.trainer

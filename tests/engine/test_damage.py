"""Damaged checkpoints: told of, never used, and another one is taken where there is one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
from engine.callbacks import ModelCheckpoint
from injection import Acts, at, ordinary_user, time_limit
from torch import Tensor
from toy import Net, loader, trainer, weights


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Tensor]:
    """The files of a run that was stopped, and the weights with which it would have ended."""
    folder = tmp_path_factory.mktemp("two")
    whole = go_on(folder / "whole", None)
    with pytest.raises(SystemExit):
        go_on(folder / "c", None, at("on_train_batch_end", 10, lambda run: signal.raise_signal(signal.SIGTERM)))
    files = {file.name: file.read_bytes() for file in (folder / "c").iterdir()}
    assert sorted(files) == ["last.ckpt", "previous.ckpt"]
    return files, whole


def go_on(folder: Path, ckpt_path: str | Path | None, *acts: Acts) -> Tensor:
    engine.seed_everything(3 if not folder.exists() else 99)
    model = Net()
    saver = ModelCheckpoint(folder, save_top_k=0, save_last=True)
    run = trainer(callbacks=[*acts, saver], enable_checkpointing=True, max_epochs=3)
    run.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return weights(model)


def records(content: bytes, path: Path) -> dict[str, int]:
    """An offset within each record of a checkpoint."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.file_size]
    offsets = {}
    for info in infos:
        sizes = struct.unpack_from("<HH", content, info.header_offset + 26)
        offsets[info.filename] = info.header_offset + 30 + sum(sizes) + info.file_size // 2
    return offsets


def put(files: dict[str, bytes]) -> Path:
    folder = Path("c")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for stamp, name in enumerate(("previous.ckpt", "last.ckpt")):
        (folder / name).write_bytes(files[name])
        os.utime(folder / name, (1e9 + stamp, 1e9 + stamp))
    return folder


def flipped(content: bytes, offset: int, bit: int = 4) -> bytes:
    damaged = bytearray(content)
    damaged[offset] ^= 1 << bit
    return bytes(damaged)


def told(folder: Path, ckpt_path: str | Path) -> tuple[Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = go_on(folder, ckpt_path)
    return result, [str(warning.message) for warning in caught]


def test_a_flipped_byte_in_any_record_makes_auto_take_the_other_file(two_files: Any) -> None:
    files, whole = two_files
    places = records(files["last.ckpt"], Path("x.ckpt"))
    assert len(places) > 5
    for record, offset in places.items():
        folder = put(files | {"last.ckpt": flipped(files["last.ckpt"], offset)})
        result, lines = told(folder, "auto")
        assert result.equal(whole), record
        assert any("c/last.ckpt" in line and record in line and "older" in line for line in lines), record


def test_a_bit_flipped_anywhere_is_harmless_or_told_of(two_files: Any) -> None:
    files, whole = two_files
    draw = random.Random(11)
    seen = 0
    for _ in range(120):
        offset, bit = draw.randrange(len(files["last.ckpt"])), draw.randrange(8)
        result, lines = told(put(files | {"last.ckpt": flipped(files["last.ckpt"], offset, bit)}), "auto")
        assert result.equal(whole), (offset, bit)
        seen += any("c/last.ckpt" in line for line in lines)
    assert seen > 40


def test_a_file_cut_short_anywhere_makes_auto_take_the_other_file(two_files: Any) -> None:
    files, whole = two_files
    content = files["last.ckpt"]
    for length in [0, 1, 3, 4, 22, 100, *range(200, len(content), 801), len(content) - 1]:
        result, lines = told(put(files | {"last.ckpt": content[:length]}), "auto")
        assert result.equal(whole) and any("c/last.ckpt" in line for line in lines), length


def test_where_all_files_are_damaged_auto_says_so_and_starts_afresh(two_files: Any) -> None:
    files, whole = two_files
    folder = put({name: content[:-40] for name, content in files.items()})
    engine.seed_everything(3)
    result, lines = told(folder, "auto")
    assert all(any(f"c/{name} is damaged" in line for line in lines) for name in files)
    assert not result.equal(whole)
    with pytest.raises(engine.MisconfigurationException, match="c/last.ckpt is damaged"):
        go_on(put({name: content[:-40] for name, content in files.items()}), "c/last.ckpt")


def test_an_explicit_path_never_falls_back(two_files: Any) -> None:
    files, _ = two_files
    put(files | {"last.ckpt": flipped(files["last.ckpt"], records(files["last.ckpt"], Path("x")).popitem()[1])})
    with pytest.raises(engine.MisconfigurationException, match="c/last.ckpt is damaged"):
        go_on(Path("c"), "c/last.ckpt")


def test_a_good_file_that_cannot_be_read_now_is_not_taken_for_damaged(two_files: Any) -> None:
    """Starting afresh would write over it."""
    files, _ = two_files
    folder = put(files)
    for name in files:
        (folder / name).chmod(0)
    with ordinary_user(), pytest.raises((OSError, engine.MisconfigurationException), match="cannot be read|denied"):
        go_on(folder, "auto")
    for name, content in files.items():
        (folder / name).chmod(0o600)
        assert (folder / name).read_bytes() == content

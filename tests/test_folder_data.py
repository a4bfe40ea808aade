"""Pictures in one folder per class, written as real files in the formats that people have."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import MisconfigurationException
from PIL import Image
from utils.registry import build


def folder_data(root: Path, split: str = "train", **arguments: Any) -> Any:
    return build("data", "folder_data", {"split": split, "root": str(root), **arguments})


def write(root: Path, *names: str, size: tuple[int, int] = (20, 12), color: Any = (255, 0, 51)) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(root / name)


def refuses(text: str, root: Path, split: str = "train", **arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        folder_data(root, split, **arguments)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write(tmp_path / "pets", "dog/b.png", "dog/a.JPG", "cat/deep/er/c.webp", "cat/z.bmp")
    return tmp_path / "pets"


def test_classes_are_folders_in_order_of_their_names(pets: Path) -> None:
    data = folder_data(pets, size=8)
    assert data.class_names == ["cat", "dog"] and data.num_classes == 2
    assert data.names == ["cat/deep/er/c.webp", "cat/z.bmp", "dog/a.JPG", "dog/b.png"]
    assert data.targets == [0, 0, 1, 1] and len(data) == 4
    assert data.splits == ("train",)
    refuses("no split val of its own; it has train", pets, "val")
    refuses("no split predict", pets, "predict")


def test_a_sample_is_an_image_from_0_to_1_and_its_class(pets: Path) -> None:
    data = folder_data(pets, size=8, augment=False)
    image, target = data[3]
    assert image.dtype == torch.float32 and tuple(image.shape) == data.sample_shape == (3, 8, 8)
    assert target == 1
    assert torch.allclose(image.mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]))


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (3, 3), (1, 9)])
def test_pictures_of_any_size_are_brought_to_one(tmp_path: Path, size: tuple[int, int]) -> None:
    write(tmp_path, "a/1.png", "b/1.png", size=size)
    for augment in (False, True):
        assert folder_data(tmp_path, size=16, grayscale=True, augment=augment)[0][0].shape == (1, 16, 16)


def test_the_middle_of_the_longer_side_is_kept(tmp_path: Path) -> None:
    picture = np.zeros((10, 30), np.uint8)
    picture[:, 10:20] = 255
    write(tmp_path, "b/1.png")
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "1.png")
    assert folder_data(tmp_path, size=10, augment=False)[0][0].eq(1).all()


def test_augmentation_can_be_switched_in_a_copy(tmp_path: Path) -> None:
    left_is_white = np.repeat(np.array([[255] * 8 + [0] * 8], np.uint8), 16, 0)
    write(tmp_path, "b/1.png")
    (tmp_path / "a").mkdir()
    Image.fromarray(left_is_white).save(tmp_path / "a" / "1.png")
    data = folder_data(tmp_path, size=16, flip=True)
    plain = copy.copy(data)
    plain.augment = False
    assert data.augment and all(torch.equal(plain[0][0], plain[0][0]) for _ in range(5))
    seen = [data[0][0] for _ in range(50)]
    assert len({tuple(image.flatten().tolist()) for image in seen}) > 5
    assert {bool(image[0, :, :6].mean() > image[0, :, 10:].mean()) for image in seen} == {True, False}
    mirrored = folder_data(tmp_path, size=16)
    assert all(image[0, :, :6].mean() > image[0, :, 10:].mean() for image in (mirrored[0][0] for _ in range(20)))


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "valid", "Testing")])
def test_folders_of_splits_are_splits_of_its_own(tmp_path: Path, words: tuple[str, ...]) -> None:
    for word, count in zip(words, (3, 1, 2), strict=True):
        write(tmp_path / word, *[f"{kind}/{index}.png" for kind in ("cat", "dog") for index in range(count)])
    write(tmp_path / words[0], "owl/1.png")  # the others have none of these
    sets = {split: folder_data(tmp_path, split) for split in ("train", "val", "test", "predict")}
    assert all(set(data.splits) == set(sets) and data.class_names == ["cat", "dog", "owl"] for data in sets.values())
    assert [len(data) for data in sets.values()] == [7, 2, 4, 4]
    assert sets["predict"].names == sets["test"].names and sets["predict"].targets == [0, 0, 1, 1]
    assert not set(sets["train"].names) & set(sets["test"].names)
    assert [data.augment for data in sets.values()] == [True, False, False, False]


def test_a_missing_split_is_not_its_own(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png")
    assert set(folder_data(tmp_path).splits) == {"train", "test", "predict"}
    refuses("no split val of its own", tmp_path, "val")


def test_pictures_for_predict_have_no_class(pets: Path) -> None:
    write(pets / "predict", "2.png", "1.png")
    assert folder_data(pets).class_names == ["cat", "dog"]
    data = folder_data(pets, "predict", size=8)
    assert set(data.splits) == {"train", "predict"}
    assert data.names == ["predict/1.png", "predict/2.png"] and data.targets is None
    assert isinstance(data[0], torch.Tensor) and data[0].shape == (3, 8, 8)


def test_hidden_and_other_files_are_left_aside(pets: Path) -> None:
    write(pets, ".thumbs/1.png", "cat/.cache/1.png")
    (pets / "cat" / "._z.png").write_bytes(b"resource fork")
    (pets / "cat" / "Thumbs.db").write_bytes(b"")
    (pets / "readme.txt").write_text("pictures of pets")
    assert len(folder_data(pets)) == 4


def test_a_linked_class_folder_is_read(pets: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    (pets / "owl").symlink_to(tmp_path / "elsewhere")
    assert folder_data(pets).names[-1] == "owl/1.png"


def save(file: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> None:
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(file, **options)


GRAY = np.full((9, 9), 51, np.uint8)
KINDS: dict[str, Any] = {
    "bilevel.png": lambda f: save(f, np.full((9, 9), 255, np.uint8), "1"),
    "gray.png": lambda f: save(f, GRAY),
    "alpha.png": lambda f: save(f, GRAY, "RGBA"),
    "gray_alpha.png": lambda f: save(f, GRAY, "LA"),
    "palette.png": lambda f: save(f, GRAY, "P"),
    "palette_alpha.png": lambda f: save(f, GRAY, "P", transparency=bytes([0, 128, 255])),
    "cmyk.jpg": lambda f: save(f, GRAY, "CMYK"),
    "deep.png": lambda f: save(f, np.full((9, 9), 13107, np.uint16)),
    "deep.tif": lambda f: save(f, np.full((9, 9), 13107, np.uint16)),
    "big_endian.tif": lambda f: save(f, np.full((9, 9), 13107, ">u2")),
    "wide.tif": lambda f: save(f, np.full((9, 9), 13107, np.int32)),
    "float.tif": lambda f: save(f, np.full((9, 9), 0.2, np.float32)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read_alike(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        KINDS[kind](tmp_path / name / kind)
    value = 1.0 if kind == "bilevel.png" else 0.2
    for grayscale in (False, True):
        for augment in (False, True):
            data = folder_data(tmp_path, size=8, grayscale=grayscale, augment=augment)
            assert data[0][0].shape == data.sample_shape == (1 if grayscale else 3, 8, 8)
            assert data[0][0].dtype == torch.float32
            assert data[0][0].max().item() == pytest.approx(value, abs=0.01)


def test_deep_pictures_keep_their_depth(tmp_path: Path) -> None:
    ramp = np.arange(0, 64 * 4, 4, dtype=np.uint16).reshape(8, 8)  # all of it within one step of eight bits
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1.png", ramp)
    assert len(folder_data(tmp_path, size=8, augment=False)[0][0][0].unique()) == 64


def test_pictures_stand_as_the_camera_was_held(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        save(tmp_path / name / "1.jpg", pixels, exif=exif)
    image = folder_data(tmp_path, size=16, augment=False)[0][0]
    assert image[:, :6].max() < 0.1 and image[:, 10:].min() > 0.9


def test_a_large_jpeg_looks_the_same(tmp_path: Path) -> None:
    slope = np.linspace(0, 255, 1600).astype(np.uint8)[None].repeat(1200, 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1.jpg", slope)
    image = folder_data(tmp_path, size=32, grayscale=True, augment=False)[0][0]
    expected = torch.linspace(1 / 8, 7 / 8, 33)  # 1200 of the 1600 columns
    assert (image.mean((0, 1)) - (expected[1:] + expected[:-1]) / 2).abs().max() < 0.02


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_an_unreadable_picture_is_named(pets: Path, content: bytes) -> None:
    (pets / "cat" / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"pets/cat/a\.png cannot be read as a picture"):
        folder_data(pets)[0]


def test_a_picture_cut_short_is_named(pets: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    save(pets / "cat" / "a.jpg", pixels)
    whole = (pets / "cat" / "a.jpg").read_bytes()
    (pets / "cat" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cat/a\.jpg cannot be read as a picture .*truncated"):
        folder_data(pets)[0]


def test_what_is_wrong_with_folders_is_one_line(pets: Path, tmp_path: Path) -> None:
    refuses(f"there is no folder {tmp_path / 'nowhere'}", tmp_path / "nowhere")
    write(tmp_path / "flat", "1.png")
    refuses("flat holds no folders; give each class a folder", tmp_path / "flat")
    write(tmp_path / "one", "cat/1.png")
    refuses("one holds one class only (cat)", tmp_path / "one")
    (pets / "empty").mkdir()
    refuses("pets/empty holds no pictures (.jpg", pets)
    refuses("size=0", pets, size=0)


def test_what_is_wrong_with_folders_of_splits_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a", "test/cat/1.png", "val/dog/1.png")
    refuses("has test, val and no folder train; add it", tmp_path / "a", "test")
    write(tmp_path / "b", "train/cat/1.png", "train/dog/1.png", "test/owl/1.png")
    refuses("test/owl is a class that", tmp_path / "b", "test")
    refuses("it has cat, dog", tmp_path / "b", "test")
    (tmp_path / "b" / "val" / "cat").mkdir(parents=True)
    refuses("val holds no pictures", tmp_path / "b", "val")
    write(tmp_path / "b", "valid/cat/1.png")
    refuses("has val and valid, both for val", tmp_path / "b")

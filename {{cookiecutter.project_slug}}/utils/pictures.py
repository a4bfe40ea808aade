"""Pictures: files of them, read to the size that a net takes.

torchvision is imported when it is needed: it takes nearly as long as torch, and --help does without.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Files that Pillow reads; of moving pictures it is the first.
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jfif")
# What stands for white in pictures of more than 8 bits; those of floats are taken to be from 0 to 1.
WHITE = {"I": 65535.0, "I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "F": 1.0}


def describe_reading(size: int, grayscale: bool) -> dict[str, Any]:
    """What `read_picture` makes of a picture, for whoever uses the net elsewhere."""
    resize = f"shorter side to {size}, then centre crop"
    return {"channels": "L" if grayscale else "RGB", "range": [0, 1], "resize": resize}


def read_picture(file: Path, size: int, grayscale: bool, augment: bool, flip: bool) -> Tensor:
    """A picture as float32 of shape (channels, size, size) from 0 to 1.

    Args:
        file: The picture.
        size: Height and width: the shorter side is resized to it, the longer one cropped.
        grayscale: Read one channel instead of three.
        augment: Crop at random, after padding by an eighth.
        flip: Also mirror at random.
    """
    from torchvision.transforms import v2

    image = v2.functional.resize(_decode(file, size, grayscale), [size])
    if augment:
        image = v2.RandomCrop(size, padding=size // 8)(image)
        image = v2.RandomHorizontalFlip(0.5 if flip else 0.0)(image)
    else:
        image = v2.functional.center_crop(image, [size])
    return v2.functional.to_dtype(image, torch.float32, scale=True)


def picture_of_shape(file: Path, shape: tuple[int, ...]) -> Tensor:
    """A picture as float32 of a shape (channels, height, width) from 0 to 1, with 1 or 3 channels.

    A square one is that of `read_picture`; any other is resized to exactly that height and width.
    """
    channels, height, width = shape
    if height == width:
        return read_picture(file, height, channels == 1, augment=False, flip=False)
    from torchvision.transforms import v2

    image = v2.functional.resize(_decode(file, max(height, width), channels == 1), [height, width])
    return v2.functional.to_dtype(image, torch.float32, scale=True)


def _decode(file: Path, size: int, grayscale: bool) -> Tensor:
    """A picture in its own size, or in a smaller one of at least `size`: uint8, or float32 from 0 to 1."""
    from torchvision.transforms import v2

    try:
        with Image.open(file) as opened:
            # A large JPEG is decoded at a half, a quarter or an eighth of its size if that is enough: much faster.
            opened.draft(None, (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(opened)  # as the camera was held
            if picture.mode in WHITE:
                deep = np.asarray(picture, dtype=np.float32) / WHITE[picture.mode]
                return torch.from_numpy(deep).expand(1 if grayscale else 3, -1, -1)
            # Palettes with transparency have to be looked up first.
            picture = picture.convert("RGBA") if picture.mode == "P" else picture
            return v2.functional.to_image(picture.convert("L" if grayscale else "RGB"))
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}); repair or remove it") from error


def files_below(root: Path, folder: Path, suffixes: tuple[str, ...] = PICTURES) -> list[str]:
    """Paths, relative to root, of all files in a folder and below that end so; hidden ones are left out.

    A folder that cannot be read stands for its files, so that whoever reads them learns of it.
    """
    names: list[str] = []
    unreadable: list[OSError] = []
    seen = {os.path.realpath(folder)}
    for parent, below, files in os.walk(folder, onerror=unreadable.append, followlinks=True):
        # Links may lead round in circles: no folder is looked into twice.
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in below if not name.startswith(".")}
        below[:] = sorted(name for name, path in real.items() if path not in seen)
        seen.update(real.values())
        files = [name for name in files if name.lower().endswith(suffixes) and not name.startswith(".")]
        where = Path(parent).relative_to(root)
        names += [(where / name).as_posix() for name in files]
    names += [Path(error.filename).relative_to(root).as_posix() for error in unreadable]
    return sorted(names)

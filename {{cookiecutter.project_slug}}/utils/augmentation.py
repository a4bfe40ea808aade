"""Augmentation of a whole batch of images at once, in which every image has random parameters of its own.

Images are of shape (images, channels, height, width), on any device. A dataset calls these functions in `__getitems__`;
in `__getitem__`, for one image: `random_flip(image[None])[0]`. Training through the engine, what an image gets depends
on seed, epoch and index only, whatever it is read together with.

What only moves pixels takes any dtype, and is best done to uint8, before `scaled`. On the CPU it is done by NumPy:
torch would start threads for so little work, and wait for them where the CPU is busy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import engine


def uniform(images: Tensor, columns: int) -> np.ndarray:
    """Random numbers from 0 to 1, without 1: float64 of shape (images, columns), new ones in every call."""
    # Lightning, in place of the engine, has no such function: a batch's numbers are one sequence then.
    draw = getattr(engine, "sample_uniform", None)
    count = len(images)
    numbers: Tensor = draw(count, columns) if draw else torch.rand(count, columns, dtype=torch.float64)
    return numbers.numpy()


def take(values: Tensor | np.ndarray | Sequence[Any], indices: Sequence[int]) -> Tensor:
    """A copy of some rows, `values[indices]`, faster: by NumPy on the CPU, and without waiting for a GPU."""
    if isinstance(values, Tensor) and not _by_numpy(values):
        return values[_like(values, np.asarray(indices))]
    array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    return torch.from_numpy(array[np.asarray(indices)])


def scaled(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 as float32 from 0 to 1; the same bits on every device."""
    if _by_numpy(pixels):
        return torch.from_numpy(np.multiply(pixels.numpy(), np.float32(1 / 255), dtype=np.float32))
    return pixels.float().mul_(1 / 255)


def random_crop(images: Tensor, padding: int = 0, size: tuple[int, int] | None = None) -> Tensor:
    """Cut each image out at a random place, after adding a margin of zeros (He et al. 2016, section 4.2).

    Args:
        images: Images.
        padding: Pixels to add at every side.
        size: Height and width to cut out. Default: those of the images, which move by up to `padding`.
    """
    count, channels, *whole = images.shape
    height, width = size or whole
    free = np.add(whole, 2 * padding) - (height, width) + 1
    if free.min() < 1:
        raise ValueError(f"size={size} of images of {whole[0]} x {whole[1]}; give a smaller one, or padding")
    top, left = (uniform(images, 2) * free).astype(np.int64).T
    if not _by_numpy(images):
        padded = F.pad(images, (padding,) * 4) if padding else images
        windows = padded.unfold(2, height, 1).unfold(3, width, 1).movedim(1, 3)
        return windows[tuple(_like(images, part) for part in (np.arange(count), top, left))]
    pixels = images.numpy()
    if padding:
        bare, inner = pixels, slice(padding, -padding)
        pixels = np.zeros((count, channels, whole[0] + 2 * padding, whole[1] + 2 * padding), bare.dtype)
        pixels[:, :, inner, inner] = bare
    # All windows there are, as views; those that were drawn are copied.
    by_image, by_channel, by_row, by_column = pixels.strides
    strides = (by_image, by_row, by_column, by_channel, by_row, by_column)
    shape = (count, *free.tolist(), channels, height, width)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(pixels, shape, strides)[np.arange(count), top, left])


def random_flip(images: Tensor, probability: float = 0.5) -> Tensor:
    """Mirror images, left to right, each with a probability: right for photographs, wrong for digits and letters."""
    chosen = uniform(images, 1)[:, 0] < probability
    if not _by_numpy(images):
        return torch.where(_like(images, chosen[:, None, None, None]), images.flip(-1), images)
    flipped = images.numpy().copy()
    flipped[chosen] = flipped[chosen][..., ::-1]
    return torch.from_numpy(flipped)


def random_erasing(
    images: Tensor,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Set a rectangle of each image to zero, with a probability (Zhong et al. 2020).

    Args:
        images: Images.
        probability: Of each image, to lose a rectangle.
        area: Least and largest share of the image. A rectangle is never higher or wider than the image.
        ratio: Least and largest height divided by width; the logarithm is drawn evenly.
    """
    height, width = images.shape[2:]
    chosen, share, form, down, right = uniform(images, 5).T
    pixels = (area[0] + share * (area[1] - area[0])) * height * width
    form = np.exp(math.log(ratio[0]) + form * math.log(ratio[1] / ratio[0]))
    high = np.minimum(np.rint(np.sqrt(pixels * form)), height) * (chosen < probability)
    wide = np.minimum(np.rint(np.sqrt(pixels / form)), width)
    top, left = (down * (height - high + 1)).astype(np.int64), (right * (width - wide + 1)).astype(np.int64)
    inside = _between(top, high, height)[:, None, :, None] & _between(left, wide, width)[:, None, None, :]
    if not _by_numpy(images):
        return images.masked_fill(_like(images, inside), 0)
    return torch.from_numpy(np.where(inside, images.numpy().dtype.type(0), images.numpy()))


def random_affine(
    images: Tensor,
    degrees: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Turn, move and resize each image about its centre; between pixels by bilinear interpolation, zeros around.

    Args:
        images: Images of floats.
        degrees: Largest angle, either way.
        translate: Largest move, either way, as a share of the width and of the height.
        scale: Least and largest factor.
    """
    _check_floats(images, "random_affine")
    height, width = images.shape[2:]
    turn, across, down, factor = uniform(images, 4).T
    angle = np.deg2rad((2 * turn - 1) * degrees)
    factor = scale[0] + factor * (scale[1] - scale[0])
    cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
    right, below = (2 * across - 1) * translate[0] * width, (2 * down - 1) * translate[1] * height
    # Where each pixel of the result comes from, in units of half the width and half the height.
    matrix = [cos, sin * height / width, -(cos * right + sin * below) * 2 / width]
    matrix += [-sin * width / height, cos, (sin * right - cos * below) * 2 / height]
    theta = _like(images, np.stack(matrix, 1).astype(np.float32)).view(-1, 2, 3).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_brightness(images: Tensor, by: float = 0.2) -> Tensor:
    """Multiply each image, of floats from 0 to 1, by a factor from 1 - by to 1 + by."""
    _check_floats(images, "random_brightness")
    return (images * _factors(images, by)).clamp_(0, 1)


def random_contrast(images: Tensor, by: float = 0.2) -> Tensor:
    """Multiply the distance of each image, of floats from 0 to 1, from its mean grey by a factor from 1 - by to 1 + by.

    Grey is the luma of RGB images (ITU-R BT.601), and the mean of the channels of all others.
    """
    _check_floats(images, "random_contrast")
    weights = np.array([0.2989, 0.587, 0.114] if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1])
    luma = _like(images, weights.astype(np.float32)).to(images.dtype).view(1, -1, 1, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return torch.lerp(mean, images, _factors(images, by)).clamp_(0, 1)


def _factors(images: Tensor, by: float) -> Tensor:
    factors = 1 + (2 * uniform(images, 1) - 1) * by
    return _like(images, factors.astype(np.float32)).to(images.dtype).view(-1, 1, 1, 1)


def _between(first: np.ndarray, count: np.ndarray, length: int) -> np.ndarray:
    """Which places of a row belong to a stretch of it: bool of shape (stretches, length)."""
    places = np.arange(length)
    return (places >= first[:, None]) & (places < (first + count)[:, None])


def _by_numpy(images: Tensor) -> bool:
    return images.device.type == "cpu" and images.dtype is not torch.bfloat16  # which NumPy lacks


def _like(images: Tensor, values: Any) -> Tensor:
    """An array where the images are. It is small, and staged at once: nothing waits for the GPU."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(images.device, non_blocking=True)


def _check_floats(images: Tensor, name: str) -> None:
    if not images.is_floating_point():
        raise ValueError(f"{name} takes images of floats, not {images.dtype}; do it after scaled")

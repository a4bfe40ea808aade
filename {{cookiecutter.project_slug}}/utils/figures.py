"""Figures: one style, colours that everybody can tell apart, and a function for each kind of picture."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#6B7280"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", "#000000")
INK, PALE = "#1F2937", "#E5E7EB"
# Where the first lacks a letter of a name, the next that is installed is asked.
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Yu Gothic"]
FONTS += ["Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"]
DPI = 150
# Width and height of a plot of lines, in inches: three of them stand side by side on a page.
PANEL = 3.35, 2.7
# Cells of a matrix have numbers, and ticks have names, up to so many classes.
WITH_NUMBERS, WITH_NAMES = 16, 40
# Panels of a regression with several targets.
MOST_TARGETS = 4


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures have our style."""
    import matplotlib
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    ours: Any = {
        "font.family": [font for font in FONTS if font in there],
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "axes.unicode_minus": False,
        # A dollar in a name is a dollar.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(ours):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, whose size is given in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(drawn)
    return drawn


def png(drawn: Figure) -> bytes:
    """A figure as the bytes of a PNG file, with a white background."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that no font here has are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        drawn.savefig(content, format="png", facecolor="white")
    return content.getvalue()


def learning_curve(measure: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], best: float | None) -> Figure:
    """A line for each kind of data.

    Args:
        measure: What is measured, such as loss.
        lines: By name of the line: epochs, and values. A line that ends with "(steps)" is drawn faintly; one with a
            single value is a point, and that of the test stands where the best checkpoint was saved.
        best: After how many epochs the best checkpoint was saved, if one was.
    """
    drawn = figure(*PANEL)
    ax = drawn.subplots()
    solid = [name for name in lines if not name.endswith("(steps)")]
    for name, (epochs, values) in lines.items():
        colour = _colour(name, solid)
        if name.endswith("(steps)"):
            ax.plot(epochs, values, color=colour, alpha=0.3, linewidth=1)
        elif len(values) == 1:
            place = best if best is not None and name.startswith("test") else epochs[0]
            # That of a single set of several has the colour of its line, and needs no entry of its own.
            label = "" if name.replace("test/", "val/") in set(lines) - {name} else name
            ax.plot(place, values[0], "D", color=colour, label=label, markersize=6, clip_on=False, zorder=3)
        else:
            marker = "o" if len(values) <= 20 else None
            ax.plot(epochs, values, color=colour, label=name, marker=marker, markersize=3, linewidth=1.8)
    if best is not None:
        ax.axvline(best, color=GREY, linestyle=":", linewidth=1.3, label="best checkpoint")
    ax.set(title=measure, xlabel="Epochs trained")
    values = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
    if measure.endswith("loss") and values.size and 0 < values.min() < values.max() / 30:
        # What happens near the end would be flat otherwise.
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlim(left=0)
    ax.legend(fontsize=8)
    _whole_numbers(ax)
    return drawn


def confusion_matrix(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Samples by true and predicted class; the colour is the share of the true class.

    Args:
        counts: Of shape (classes, classes), true by predicted.
        names: Of the classes.
        title: Above the matrix.
    """
    from matplotlib.colors import PowerNorm

    classes = len(counts)
    numbered = classes <= WITH_NUMBERS
    size = min(1.6 + 0.32 * classes, 10.0)
    drawn = figure(size + (0.1 if numbered else 1.0), size)
    ax = drawn.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Darker than in proportion, so that single mistakes are seen.
    image = ax.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    ax.grid(False)
    shown = range(classes) if classes <= WITH_NAMES else range(0, classes, math.ceil(classes / 20))
    upright = classes > 6 and max(map(len, names)) > 3
    labels = _labels(names)
    ax.set_xticks(list(shown), [labels[n] for n in shown], rotation=90 if upright else 0, fontsize=9)
    ax.set_yticks(list(shown), [labels[n] for n in shown], fontsize=9)
    ax.set(title=title, xlabel="Predicted class", ylabel="True class")
    if numbered:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.3 else INK
                size = 9 if classes <= 10 else 7
                ax.text(column, row, f"{int(count):,}", ha="center", va="center", color=colour, fontsize=size)
        return drawn
    bar = drawn.colorbar(image, ax=ax, shrink=0.75, label="Share of the true class")
    bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1], labels=["0%", "1%", "10%", "25%", "50%", "100%"])
    bar.outline.set_visible(False)
    return drawn


def per_class(names: Sequence[str], table: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Precision and recall of each class on a line; the worst class, by F1, is at the top."""
    from matplotlib.ticker import MaxNLocator

    # A class that is not there, and that was never predicted, is neither good nor bad.
    judged = [number for number, row in enumerate(table) if not math.isnan(row["F1"])]
    order, labels = sorted(judged, key=lambda n: table[n]["F1"])[:WITH_NAMES], _labels(names)
    drawn = figure(5.0, 1.3 + 0.3 * len(order))
    ax = drawn.subplots()
    places = np.arange(len(order))
    precision, recall = ([table[n][column] for n in order] for column in ("precision", "recall"))
    ax.hlines(places, np.minimum(precision, recall), np.maximum(precision, recall), color=PALE, linewidth=4)
    ax.plot(precision, places, "o", color=BLUE, label="precision", markersize=7, clip_on=False)
    ax.plot(recall, places, "D", color=ORANGE, label="recall", markersize=5.5, clip_on=False)
    ax.set_yticks(places, [f"{labels[n]}  ({table[n]['samples']:,.0f})" for n in order], fontsize=9)
    ax.set_ylim(len(order) - 0.5, -0.5)
    lowest = np.nanmin([*precision, *recall, 1.0])
    ax.set_xlim(max(0.0, math.floor(lowest * 20 - 1) / 20), 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], nbins=6))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value * 100:g}%")
    ax.set_title(title, pad=24)
    ax.set_ylabel("Class (samples)")
    ax.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, fontsize=9)
    return drawn


def pictures(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], inches: float) -> Figure:
    """Pictures in rows of four, each with a caption below.

    Args:
        images: Of shape (1 or 3, height, width); their smallest value is shown black, their largest white.
        captions: The lines of each one's caption, which are cut where they would be too long.
        inches: Width of each.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    square, below = 0.92 * inches, 0.14 * max(map(len, captions)) + 0.1
    width, height = inches * columns, (square + below) * rows
    # Placed by hand: a layout that makes room for captions would shrink the pictures to nothing.
    drawn = figure(width, height)
    drawn.set_layout_engine("none")
    for place, (image, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = (column + 0.04) * inches, height - row * (square + below)
        ax = drawn.add_axes((left / width, (top - square) / height, square / width, square / height))
        ax.set_axis_off()
        low, high = float(image.min()), float(image.max())
        image = (image - low) / (high - low if high > low else 1)
        smooth = "nearest" if max(image.shape) < 64 else "antialiased"
        ax.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), cmap="gray", interpolation=smooth)
        text = "\n".join(_short(line, int(inches * 14)) for line in lines)
        ax.text(0.5, -0.03, text, transform=ax.transAxes, ha="center", va="top", fontsize=8)
    return drawn


def predicted_against_true(values: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """A panel for each target, with a point for each sample; on the line, predictions are right.

    Args:
        values: Of shape (samples, 2, targets): true, and predicted.
        names: Of the targets.
        title: Above all.
    """
    from matplotlib.ticker import MaxNLocator

    count = values.shape[2]
    drawn = figure(4.6 * count, 4.4)
    drawn.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    for number, ax in enumerate(drawn.subplots(1, count, squeeze=False).flatten()):
        true, predicted = values[:, 0, number], values[:, 1, number]
        ends = [float(np.min(values[:, :, number])), float(np.max(values[:, :, number]))]
        ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2, label="right")
        ax.plot(
            true, predicted, "o", color=BLUE, alpha=0.5 if len(true) < 1000 else 0.15, markersize=4, markeredgewidth=0
        )
        told = names[number]
        ax.set(xlabel=f"True {told}", ylabel=f"Predicted {told}", aspect="equal", adjustable="datalim")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4))
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
    return drawn


def learning_rate(rates: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """The learning rate of each optimizer, over epochs."""
    drawn = figure(*PANEL)
    ax = drawn.subplots()
    for colour, (name, (epochs, values)) in zip(SERIES, rates.items(), strict=False):
        marker = "o" if len(values) <= 20 else None
        ax.plot(epochs, values, color=colour, linewidth=1.8, label=name, marker=marker, markersize=3)
    if len(rates) > 1:
        ax.legend(fontsize=8)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(title="Learning rate", xlabel="Epochs trained")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    _whole_numbers(ax)
    return drawn


def throughput(steps: np.ndarray, speed: np.ndarray) -> Figure:
    """Samples a second, over optimizer steps."""
    drawn = figure(*PANEL)
    ax = drawn.subplots()
    ax.plot(steps, speed, color=SKY, linewidth=1.2, marker="o" if len(speed) <= 20 else None, markersize=3)
    ax.axhline(np.median(speed), color=BLUE, linestyle="--", linewidth=1.3, label=f"median {np.median(speed):,.0f}")
    ax.legend(fontsize=8)
    ax.set(title="Throughput in training", xlabel="Optimizer steps", ylabel="Samples per second")
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.2 * float(np.max(speed)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _whole_numbers(ax)
    return drawn


def folds(measure: str, values: Sequence[float]) -> Figure:
    """A point for each fold, and their mean."""
    drawn = figure(*PANEL)
    ax = drawn.subplots()
    mean = float(np.mean(values))
    ax.axhline(mean, color=GREY, linestyle="--", linewidth=1.3, label=f"mean {mean:.4g}")
    ax.plot(range(len(values)), values, "o", color=BLUE, markersize=7, clip_on=False)
    ax.set(title=measure, xlabel="Fold", xlim=(-0.5, len(values) - 0.5))
    ax.legend(fontsize=8)
    _whole_numbers(ax)
    return drawn


def _colour(name: str, names: Sequence[str]) -> str:
    """Training is blue, validation orange and the test green, whatever else is there."""
    usual = {"train": BLUE, "train (steps)": BLUE, "val": ORANGE, "test": GREEN}
    if name in usual:
        return usual[name]
    sets = [other for other in dict.fromkeys(n.replace("test/", "val/") for n in names) if other not in usual]
    name = name.replace("test/", "val/")
    return SERIES[(3 + (sets.index(name) if name in sets else 0)) % len(SERIES)]


def _labels(names: Sequence[str], most: int = 18) -> list[str]:
    """Names that are short enough; where that makes two the same, without what all begin and end with."""
    short = [_short(name, most) for name in names]
    if len(set(short)) < len(set(names)):
        start = len(os.path.commonprefix(list(names)))
        end = len(os.path.commonprefix([name[start:][::-1] for name in names]))
        short = [_short(f"…{name[start : len(name) - end]}", most) for name in names]
    if len(set(short)) < len(set(names)):
        short = [f"{number}: {_short(name, most - 4)}" for number, name in enumerate(names)]
    return short


def _short(name: str, most: int = 18) -> str:
    """A text with its middle left out, if it is wider than so many letters; those of Chinese count twice."""
    name = name.encode("utf-8", "replace").decode()  # of what no encoding has, no font has a picture
    widths = [2 if east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= most:
        return name
    head = [letter for letter, end in zip(name, np.cumsum(widths), strict=True) if end <= most // 2]
    tail = [letter for letter, end in zip(name[::-1], np.cumsum(widths[::-1]), strict=True) if end < most - most // 2]
    return f"{''.join(head)}…{''.join(tail[::-1])}"


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

"""The plot of the step benchmark: how many times the loop written by hand each contender takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from contenders import BARE, OURS
from tables import Table

MODES = {"quiet": "nothing beside the training", "realistic": "with bar, TensorBoard and checkpoints"}
OWN, OTHERS, LINE = "#c2410c", "#94a3b8", "#475569"


def draw(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Draw the tiny net's step in both modes.

    Returns:
        The files, PNG and SVG; none if there is nothing to draw.
    """
    by_key = {table.key: table for table in tables}
    found = {mode: by_key[f"step/tiny/{mode}"] for mode in MODES if f"step/tiny/{mode}" in by_key}
    if not found:
        return []
    figure, panels = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.4), layout="constrained", squeeze=False)
    highest = max(row.value or 1 for table in found.values() for row in table.rows)
    for panel, (mode, table) in zip(panels[0], found.items(), strict=True):
        rows = [row for row in table.rows if row.value and row.name != BARE and "fastest peer" not in row.name]
        rows.sort(key=lambda row: row.value or 0)
        names = [row.name for row in rows]
        values = [row.value or 0 for row in rows]
        colors = [OWN if row.name == OURS else OTHERS for row in rows]
        # Bars that start at 1: their length is what is added to the loop.
        bars = panel.barh(names, [value - 1 for value in values], left=1, color=colors, height=0.62)
        for bar, value in zip(bars, values, strict=True):
            panel.annotate(
                f"{value:.2f}",
                (max(value, 1), bar.get_y() + bar.get_height() / 2),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=LINE,
            )
        style(panel, min(values), highest)
        panel.set_title(f"{mode}: {MODES[mode]}", loc="left", fontsize=10)
    figure.supxlabel(
        "CPU time of a step, in steps of the plain loop written by hand (log scale)", fontsize=9, color=LINE
    )
    paths = [folder / "speed.png", folder / "speed.svg"]
    for path in paths:
        figure.savefig(path, dpi=160)
    plt.close(figure)
    return paths


def style(panel: plt.Axes, lowest: float, highest: float) -> None:
    """Quiet axes, from the loop's own time upwards, or from less if somebody takes less."""
    panel.set_xscale("log")
    panel.set_xlim(0.97 * min(lowest, 1), max(highest * 1.25, 2))
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20) if tick <= max(highest * 1.2, 2)]
    panel.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
    panel.minorticks_off()
    panel.invert_yaxis()
    panel.axvline(1, color=LINE, linewidth=1)
    panel.grid(axis="x", color="#e2e8f0", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(axis="both", length=0, labelsize=9, colors=LINE)
    for side in ("top", "right", "left", "bottom"):
        panel.spines[side].set_visible(False)


if __name__ == "__main__":
    from tables import RESULTS, recorded

    print(*draw(recorded("step"), RESULTS), sep="\n")

"""What a run has logged, read back from its folder: metrics.csv, and the times in TensorBoard's files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]


def read_curves(file: Path) -> dict[str, Curve]:
    """The values of every column of a metrics.csv that is no counter, over epochs.

    Returns:
        For each column the number of epochs that were trained at each of its values, and these values.
    """
    with open(file, newline="", encoding="utf-8") as opened:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(opened)]
    # An epoch ends with the last of its steps that is known; steps within are placed by the length of epochs before.
    ends: dict[float, float] = {}
    for row in rows:
        if "epoch" in row and not all(name.startswith("test_") for name in row.keys() - {"step", "epoch"}):
            ends[row["epoch"]] = max(ends.get(row["epoch"], 0.0), row["step"])
    steps = [0.0, *(ends[epoch] + 1 for epoch in sorted(ends))]
    epochs = [0.0, *(epoch + 1 for epoch in sorted(ends))]
    if not ends:
        steps, epochs = [0.0, max((row["step"] for row in rows), default=0.0) + 1], [0.0, 1.0]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name in row.keys() - {"step", "epoch"}:
            places, values = curves.setdefault(name, ([], []))
            # Tests are logged at the step that is next.
            at = row["step"] + (not name.startswith("test_"))
            places.append(float(np.interp(at, steps, epochs)))
            values.append(row[name])
    return {name: (np.array(places), np.array(values)) for name, (places, values) in sorted(curves.items())}


def read_speed(folder: Path, samples_per_step: int) -> Curve:
    """Samples a second in training, over optimizer steps: from the times at which TensorBoard's files got values.

    Validation lies between the values of two epochs, and a pause between those of two files: the times within an epoch
    count alone, if there are several values in one.
    """
    found = [list(_times(file)) for file in sorted(folder.glob("events.out.tfevents.*"))]
    pairs = [pair for times in found for pair in zip(times, times[1:], strict=False) if pair[1][0] > pair[0][0]]
    within = [pair for pair in pairs if pair[0][2] == pair[1][2]]
    places, speeds = [], []
    for (step, time, _), (next_step, next_time, _) in within or pairs:
        if next_time > time:
            places.append(next_step + 1)
            speeds.append((next_step - step) * samples_per_step / (next_time - time))
    return np.array(places, dtype=float), np.array(speeds)


def _times(file: Path) -> Iterator[tuple[int, float, int]]:
    """Step, time in seconds, and number of the epoch in this file, of each step whose training was logged."""
    # Late: TensorBoard is imported for a second.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    epoch, before = 0, -1
    for event in LegacyEventFileLoader(str(file)).Load():
        tags: list[str] = [value.tag for value in event.summary.value if value.tag.startswith("train_")]
        if any(not tag.endswith("_epoch") for tag in tags) and event.step > before:
            yield event.step, event.wall_time, epoch
            before = event.step
        epoch += "train_loss_epoch" in tags

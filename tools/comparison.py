"""Compare, bit by bit, what two training runs have left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

# Differences of a run that are told one by one.
MOST = 5


def compare(reference: Path, run: Path) -> list[str]:
    """What of a run is not as in the reference; both are working folders of `child`."""
    # A process that is killed in the very moment in which it has made its folder leaves it empty: that is none.
    expected, found = (sum(any(path.iterdir()) for path in top.glob("logs/*/*")) for top in (reference, run))
    differences = [] if expected == found else [f"run folders: {found}, not {expected}"]
    ours, theirs = (sorted(str(path.parent) for path in top.rglob("config.yaml")) for top in (reference, run))
    if len(ours) != len(theirs) or not ours:
        return [*differences, f"begun runs: {theirs}, not as many as {ours}"]
    for left, right in zip(map(_contents, ours), map(_contents, theirs), strict=True):
        changed = [key for key in left | right if left.get(key) != right.get(key)]
        differences += [f"{key}: {_short(right.get(key))}, not {_short(left.get(key))}" for key in changed[:MOST]]
        if len(changed) > MOST:
            differences.append(f"{len(changed) - MOST} more, the last of them {changed[-1]}")
    # A run that was killed after its last word has none.
    results = [top / "results.json" for top in (reference, run)]
    if results[1].exists() and len({file.read_text() for file in results}) > 1:
        differences.append(f"results: {results[1].read_text()}, not {results[0].read_text()}")
    return differences


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def _contents(path: str) -> dict[str, Any]:
    """All that has to be the same in a run's folder, by a name."""
    folder = Path(path)
    # Names of event files are of one process each; git.diff is of the working tree at the time.
    differing = ("events.out", "git.diff")
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.name.startswith(differing))
    found: dict[str, Any] = {"files": files, "metrics.csv": (folder / "metrics.csv").read_text()}
    found["finished"] = json.loads((folder / "environment.json").read_text()).get("finished")
    # Read as it lies there: values that were written twice are seen twice.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    for tag in events.Tags()["scalars"]:
        found[f"TensorBoard {tag}"] = sorted((event.step, repr(event.value)) for event in events.Scalars(tag))
    for file in sorted(folder.glob("checkpoints/*.ckpt")):
        content = torch.load(file, weights_only=True)
        # Names and bytes of event files are of one process each.
        content["loggers"] = [state for state in content["loggers"] if "rows" in state]
        found |= dict(_leaves(content, file.name))
    return found


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested containers by its place, as text or bytes: so that NaN equals NaN, and 0.0 not -0.0."""
    if isinstance(value, Tensor):
        yield name, (str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist())
    elif isinstance(value, dict | list | tuple):
        yield name, (type(value).__name__, len(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name}[{key!r}]")
    else:
        yield name, repr(value)

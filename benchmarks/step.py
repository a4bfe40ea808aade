"""What a training step costs under each Trainer, beside a loop written by hand: microseconds, Python calls, frames.

All train the same net from the same weights on the same batches, which lie in memory, with AdamW, on one thread, each
in a process of its own; they take turns, block by block. A ratio is formed in each round, to the plain loop written by
hand; printed is its median, and where half of the rounds lay. Quiet is the loop alone; realistic has a progress bar on
a terminal, the loss in TensorBoard every 50 steps, and a checkpoint after each block, all of them as each library's
users would have them. Time is CPU time of the whole process, threads included.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from peers import versions
from race import BY_HAND, CONTENDERS, OURS, check_same_work, contenders
from tables import judged, machine, show

# Steps of a block, rounds, and goals: quiet and realistic.
NETS: dict[str, tuple[int, int, tuple[float, float]]] = {
    "tiny": (1000, 11, (1.05, 1.10)),
    "standard_net": (100, 9, (1.02, 1.02)),
}


def count(net: str, logs: bool, names: list[str]) -> dict[str, dict[str, Any]]:
    """Python calls of a step, and frames between starting to train and the training step."""
    counted = {}
    for name in names:
        with contenders([name], "contender.py", net=net, logs=logs, block=100, epochs=1, count=True) as (one,):
            counted[name] = one.told()
    return counted


def race(net: str, logs: bool, names: list[str], block: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each block, by contender."""
    # One epoch to warm up, and one at whose first step the last block ends.
    settings = {"net": net, "logs": logs, "block": block, "epochs": rounds + 2, "count": False}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with contenders(names, "contender.py", **settings) as running:
        reference = [] if not logs else [BY_HAND]
        with contenders(reference, "contender.py", **{**settings, "logs": False}) as plain:
            everybody = [("plain", one) for one in plain] + [(one.name, one) for one in running]
            seconds |= {"plain": []} if plain else {}
            for number in range(rounds + 1):
                for name, contender in everybody:
                    spent = contender.turn()["cpu"]
                    if number:
                        seconds[name].append(spent)
            norms = {name: contender.turn()["norm"] for name, contender in everybody}
            check_same_work(norms)
    seconds.setdefault("plain", seconds[BY_HAND])
    return seconds


def rows_of(net: str, logs: bool, names: list[str], block: int, rounds: int, goal: float) -> list[list[str]]:
    """The rows of one net and one mode."""
    if logs:
        # It cannot.
        names = [name for name in names if not CONTENDERS[name][2]]
    seconds, counts = race(net, logs, names, block, rounds), count(net, logs, names)
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds["plain"], strict=True)] for n in names}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    best_peer = min((m for name, m in medians.items() if name not in (BY_HAND, OURS)), default=None)
    rows = []
    for name in sorted(names, key=lambda name: medians[name]):
        low, _, high = statistics.quantiles(ratios[name], n=4)
        goals = ""
        if name == OURS:
            goals = judged(medians[name], goal)
            goals += "" if best_peer is None else f", peers {judged(medians[name], round(best_peer, 3))}"
        counted = counts[name]
        told = f"{counted['calls']:.0f}", f"{counted['frames']}"
        cost = f"{statistics.median(seconds[name]) / block * 1e6:,.0f}"
        rows.append(
            [
                f"{net}, {'realistic' if logs else 'quiet'}",
                name,
                cost,
                f"{medians[name]:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
            + [goals, *told]
        )
    return rows


def main() -> None:
    """Race on each net, quietly and realistically."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, and only the peers that are named")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--only", nargs="+", help="these peers")
    arguments = parser.parse_args()
    peers = [] if arguments.quick else [name for name in CONTENDERS if name not in (BY_HAND, OURS)]
    names = [BY_HAND, OURS, *(arguments.only or peers)]
    headings = ["net", "loop", "µs a step", "ratio", "half of the rounds", "goal", "calls a step", "frames"]
    for net in arguments.nets:
        block, rounds, goals = NETS[net]
        rows = []
        for logs, goal in zip((False, True), goals, strict=True):
            size = (100, 4) if arguments.quick else (block, rounds)
            rows += rows_of(net, logs, names, *size, goal)
        notes = [f"{rounds} rounds of {block} steps of 64 images", f"{machine()}; {versions()}"]
        show(f"step-{net}", f"A training step of {net}, beside the plain loop written by hand", headings, rows, notes)


if __name__ == "__main__":
    main()

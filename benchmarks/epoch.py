"""What an epoch costs: wall time of training and of validation with loss and accuracy.

All train the same net with the same optimizer on the same samples in the same order, read by the same datasets, on one
thread, and take turns, epoch by epoch. In each process the loop by hand takes turns with the contender, batch
by batch, and a ratio is to that loop. Two tasks: the digits that come with a generated project, and 60,000 images of
28 x 28 pixels in MNIST's file format, of which a tenth is validated on, and which the loop by hand also reads the usual
way. Two further rows are this Trainer where the order comes from a sampler that it does not know, and, unless a part of
the samples is read, a generated project as it comes, with what it does beside the training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import mnist
from contenders import BARE, GENERATED, OURS, OWN_SAMPLER, Contender
from epochs import TASKS
from step import add_fastest_peer, choose
from tables import Table, ratio_cells, record
from turns import Racer, race_anew

PER_SAMPLE = f"{BARE}, images read one by one"
# Launches, and rounds of each. After two epochs of the larger set seeds alone still differ in accuracy by 0.1.
SIZES = {"digits": (2, 10), "mnist": (1, 2)}


def check_same_work(racing: Sequence[Racer]) -> None:
    """Compare steps, samples, their order and accuracy.

    Raises:
        RuntimeError: Somebody has done other work than the loop written by hand, or did not learn as much.
    """
    done = racing[0].end
    counts = [(who, name) for who in ("", "hand_") for name in ("steps", "trained", "validated", "order")]
    for racer in racing:
        found = {who + name: (racer.end.get(who + name), done[name]) for who, name in counts}
        other = [f"{name}: {number}, not {right}" for name, (number, right) in found.items() if number != right]
        # Random numbers differ, as libraries draw elsewhere; after few epochs seeds alone differ by more than 0.1.
        if abs(racer.end["accuracy"] - done["accuracy"]) > 0.1:
            other.append(f"accuracy {racer.end['accuracy']:.3f}, not about {done['accuracy']:.3f}")
        if other:
            raise RuntimeError(f"{racer.name} has not done the same work as the {BARE}; {'; '.join(other)}")


def table(task: str, chosen: Sequence[Contender], launches: int, rounds: int, samples: int) -> Table:
    """Race on a task."""
    some = f", {samples:,} of the samples" if samples else TASKS[task].whole
    title = f"an epoch of {task}: {TASKS[task].about}{some}"
    note = f"Training and validation, wall time, medians of {launches * rounds} rounds, launches: {launches}; "
    note += f"accuracy after {rounds + 1} epochs. “{OURS}” has shuffle=True, which draws everyone's order."
    own = [OWN_SAMPLER]
    if not samples:
        # A project reads all that its dataset has.
        own.append(GENERATED)
        note += f" “{GENERATED.name}”: this Trainer with DInterface and MInterface."
    result = Table(title, "contender", note, f"epoch/{task}")
    words = ["--blocks", str(rounds + 1), "--task", task, "--samples", str(samples)]
    entries = [(contender, words) for contender in (*chosen, *own)]
    if task == "mnist":
        entries.insert(1, (chosen[0]._replace(name=PER_SAMPLE, variant="per sample"), words))
    racing = race_anew(entries, "epochs", rounds, launches, check_same_work)
    for racer in racing:
        _, seconds, _, by_hand = (statistics.median(column) for column in zip(*racer.laps, strict=True))
        ratios = [lap.ratio("wall") for lap in racer.laps]
        cells = {"wall": f"{seconds:.2f} s", "by hand": f"{by_hand:.2f} s", **ratio_cells(ratios)}
        cells["accuracy"] = f"{racer.end['accuracy']:.3f}"
        result.add(racer.name, cells, round(statistics.median(ratios), 3))
    add_fastest_peer(result, racing, "wall")
    return result


def main() -> None:
    """Race on both tasks, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few epochs of the digits, without peers")
    parser.add_argument("--samples", type=int, default=0, help="training samples of the larger set, 384 or more [all]")
    parser.add_argument("--launches", type=int, help="how often each race is started")
    arguments = parser.parse_args()
    chosen = choose(arguments.quick)
    if arguments.quick:
        record("epoch", [table("digits", chosen, 1, 3, 0)])
        return
    mnist.write()
    results = []
    for task, (launches, rounds) in SIZES.items():
        given = arguments.samples if task == "mnist" else 0
        results.append(table(task, chosen, arguments.launches or launches, rounds, given))
    record("epoch", results)


if __name__ == "__main__":
    main()

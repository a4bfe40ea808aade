"""What a training step costs, by hand, under this Trainer, and under the peers: CPU time, Python calls, frames.

All train the same net from the same weights on the same batches, which lie in memory, on one thread, and take turns.
In each process the loop by hand takes turns with the contender, and a ratio is to that loop.
Quietly, and with what one wants to see of a run: a bar with the loss, TensorBoard every 50 steps, checkpoints.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import environments
import torch
from contenders import BARE, CONTENDERS, OURS, PEERS, Contender
from tables import Goal, Table, ratio_cells, record
from turns import Racer, race, race_anew, racers
from work import BATCH_SIZE, LOG_EVERY, TASKS


class Race(NamedTuple):
    """How long a race is.

    Attributes:
        goal: The limit of this Trainer's ratio.
        launches: How often all processes are started.
        rounds: Rounds of a launch.
        steps: Steps of a round, at whose end a checkpoint is due in the realistic mode.
        pieces: Turns within a round.
    """

    goal: float
    launches: int
    rounds: int
    steps: int
    pieces: int


# By task and mode. A turn is long enough for caches, which are cold when it begins, not to count, and shorter than what
# slows a machine: two hundred steps of the tiny net, one of the other.
RACES = {
    ("tiny", "quiet"): Race(1.05, 2, 5, 1000, 5),
    ("tiny", "realistic"): Race(1.10, 2, 3, 4000, 20),
    ("standard_net", "quiet"): Race(1.02, 2, 5, 40, 40),
    ("standard_net", "realistic"): Race(1.02, 2, 3, 120, 120),
}
BESIDE = {
    "quiet": "nothing beside the training",
    "realistic": f"with bar, logs for TensorBoard every {LOG_EVERY} steps, and checkpoints",
}


class Counts(NamedTuple):
    """What does not depend on the machine: Python calls a step, and frames of a library above the user's step."""

    calls: float
    frames: int


def entries(
    task: str, mode: str, chosen: Sequence[Contender], words: Sequence[str]
) -> list[tuple[Contender, list[str]]]:
    """Who races, the plain loop first, and with which words."""
    words = ["--task", task, *words]
    racing = [(contender, words) for contender in chosen if contender.name == BARE]
    if mode == "quiet":
        return racing + [
            (contender, words) for contender in chosen if contender.name != BARE and mode in contender.modes
        ]
    told = [(contender, [*words, "--realistic"]) for contender in chosen if mode in contender.modes]
    # The loop written by hand takes part twice.
    return racing + [(c._replace(name=f"{BARE}, realistic") if c.name == BARE else c, w) for c, w in told]


def check_same_work(racing: Sequence[Racer]) -> None:
    """Compare the weights with which all of them end, and the loops by hand in their processes.

    Raises:
        RuntimeError: Somebody has done other work than the loop written by hand.
    """
    weights = [torch.load(racer.folder / "weights.pt", weights_only=True) for racer in racing]
    bare = weights[0][0]
    for racer, ended in zip(racing, weights, strict=True):
        for name, others in zip((racer.name, f"the loop by hand beside {racer.name}"), ended, strict=True):
            if others.shape != bare.shape or not torch.allclose(others, bare, rtol=1e-3, atol=1e-5):
                raise RuntimeError(f"{name} ended with other weights than the {BARE}: it has not done the same work")


def counts(task: str, mode: str, chosen: Sequence[Contender]) -> dict[str, Counts]:
    """Counted over one block of `LOG_EVERY` steps, the second, in processes of their own."""
    words = ["--blocks", "3", "--steps", str(LOG_EVERY), "--counted", "1"]
    found = {}
    for entry in entries(task, mode, chosen, words):
        with racers([entry], "steps") as racing:
            race(racing, 3, random.Random(0))
            found[racing[0].name] = Counts(racing[0].end["calls"], racing[0].end["frames"])
    return found


def table(task: str, mode: str, chosen: Sequence[Contender], length: Race, counting: bool) -> Table:
    """Race on a task, in a mode."""
    goal, launches, rounds, size, pieces = length
    about = TASKS[task].about
    title = f"{mode} step of {task} ({about}), batches of {BATCH_SIZE}: {BESIDE[mode]}"
    note = f"CPU time, medians of {launches} launches of {rounds} rounds of {size} steps; "
    note += f"ratios are to the loop by hand, which has turns of {size // pieces}, as each contender has beside it."
    if mode == "realistic":
        note += f" A checkpoint every {size} steps. “{BARE}, realistic”: the same with tqdm, SummaryWriter, torch.save."
    result = Table(title, "contender", note, f"step/{task}/{mode}")
    words = ["--blocks", str(rounds + 1), "--steps", str(size), "--pieces", str(pieces)]
    counted = counts(task, mode, chosen) if counting else {}
    racing = race_anew(entries(task, mode, chosen, words), "steps", rounds, launches, check_same_work)
    for racer in racing:
        cost, _, by_hand, _ = (statistics.median(column) / size * 1e6 for column in zip(*racer.laps, strict=True))
        ratios = [lap.ratio("cpu") for lap in racer.laps]
        cells = {"µs a step": f"{cost:,.0f}", "by hand": f"{by_hand:,.0f}", **ratio_cells(ratios)}
        if racer.name in counted:
            cells |= {"calls": f"{counted[racer.name].calls:,.0f}", "frames": str(counted[racer.name].frames)}
        limit = Goal(goal) if racer.name == OURS else None
        result.add(racer.name, cells, round(statistics.median(ratios), 3), limit)
    add_fastest_peer(result, racing, "cpu")
    return result


def add_fastest_peer(result: Table, racing: Sequence[Racer], clock: str) -> None:
    """A line that compares this Trainer's ratio with that of the fastest peer; none without peers."""
    peers = [racer for racer in racing if racer.name in PEERS]
    ours = next((racer for racer in racing if racer.name == OURS), None)
    if not peers or ours is None:
        return
    fastest = min(peers, key=lambda racer: statistics.median(lap.ratio(clock) for lap in racer.laps))
    compared = [lap.ratio(clock) / by.ratio(clock) for lap, by in zip(ours.laps, fastest.laps, strict=True)]
    name = f"{OURS} / fastest peer ({fastest.name})"
    result.add(name, ratio_cells(compared), round(statistics.median(compared), 3), Goal(1.0))


def choose(quick: bool) -> list[Contender]:
    """Everyone, with their environments made; when it has to be quick the loop and this Trainer alone."""
    if quick:
        return [contender for contender in CONTENDERS if contender.name in (BARE, OURS)]
    for environment in environments.PACKAGES:
        environments.make(environment)
    return list(CONTENDERS)


def main() -> None:
    """Race on both nets in both modes, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round on the tiny net, without peers")
    parser.add_argument("--launches", type=int, help="how often each race is started")
    arguments = parser.parse_args()
    chosen = choose(arguments.quick)
    results = []
    for (task, mode), usual in RACES.items():
        if not arguments.quick:
            length = usual._replace(launches=arguments.launches or usual.launches)
            results.append(table(task, mode, chosen, length, counting=task == "tiny"))
        elif task == "tiny":
            short = usual._replace(launches=1, rounds=1, steps=LOG_EVERY, pieces=5)
            results.append(table(task, mode, chosen, short, counting=mode == "quiet"))
    record("step", results)


if __name__ == "__main__":
    main()

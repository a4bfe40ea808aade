"""Going on with another number of processes, another batch size or other windows of accumulated gradients.

Where an epoch goes on is a number of samples, of all processes together, so that whoever goes on with it takes those
that nobody has had. Batches and their windows are counted anew from there. What every process has of its own, such as
running sums, is taken over by those that there are now, so that nothing is lost or counted twice.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import distributed
from engine.checkpoint import Checkpoint
from engine.exceptions import MisconfigurationException
from engine.kinds import is_metric
from engine.meters import extreme
from engine.seed import mix, restore_rng, seed_cpu

if TYPE_CHECKING:
    from torchmetrics import Metric

    from engine.trainer import Trainer

# What may change within an epoch: how its samples are dealt out, not which ones they are.
DEALING = {"processes", "batch_size", "accumulate_grad_batches"}


def renumber(t: Trainer, path: Path, loaded: Checkpoint, now: dict[str, Any]) -> None:
    """Count the batches of the epoch that goes on as if all had been as they will be from now on.

    Args:
        t: The trainer; its state is as in the checkpoint.
        path: The checkpoint.
        loaded: What is in it.
        now: What the order of samples within an epoch depends on in this run, as in `loaded["order"]`.

    Raises:
        MisconfigurationException: The samples are others, or cannot be dealt out anew.
    """
    state, then = t.state, loaded["order"]
    changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    _warn_of_other_steps(t, then, now)
    if state.batches_done and changed:
        reason = None
        if not DEALING.issuperset(changed):
            reason = "other samples"
        elif "samples" not in now:
            reason = "samples dealt out anew, since the loader has an order of its own"
        elif t.module.automatic_optimization and any(loaded["gradients"]):
            reason = "other batches, since it has gradients within a window of accumulate_grad_batches"
        if reason is not None:
            raise MisconfigurationException(
                f"checkpoint {path} was saved within epoch {state.epoch}, which cannot go on with {reason}: now "
                f"{ {name: now.get(name) for name in changed} }, then { {name: then.get(name) for name in changed} }; "
                "put that back, or take a checkpoint of the end of an epoch"
            )
        if state.last_batch:
            # Nor do samples come back that were left out at the end.
            state.samples_done = now["samples"]
        state.batches_done = t.loaders.train().next_number(state.samples_done, t.accumulate_grad_batches)
    if state.samples_done > now.get("samples", 0):
        raise ValueError(f"{state.samples_done} samples done")


def _warn_of_other_steps(t: Trainer, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Say that a schedule of the learning rate does not fit any more, which counts steps."""
    before, after = (
        (order.get("batch_size") or 1) * order.get("processes", 1) * order.get("accumulate_grad_batches", 1)
        for order in (then, now)
    )
    if before != after and t.lr_scheduler_configs:
        distributed.rank_zero_warn(
            f"a step had {before} samples, and has {after} now: schedules of the learning rate that count steps do not "
            "fit the run any more; keep batch_size x processes x accumulate_grad_batches"
        )


def taken_over(of_each: list[Any]) -> list[Any]:
    """What this process takes over of a list with a part for each process that there was.

    It is its own part; of more processes than there are now, the parts of ranks r, r + w, r + 2w, ...; none, where
    there were fewer.
    """
    return of_each[distributed.data_rank() :: distributed.data_world_size()]


def meters(of_each: list[dict[str, Any]]) -> dict[str, Any]:
    """The running values of `self.log` that this process takes over, added up."""
    mine = taken_over(of_each)
    if not mine:
        # The same names, since at the end of an epoch all processes look at them together.
        return {**of_each[0], "meters": [_emptied(row) for row in of_each[0]["meters"]]}
    rows = {tuple(row[:4]): row for row in mine[0]["meters"]}
    for row in [row for state in mine[1:] for row in state["meters"]]:
        there = rows.get(tuple(row[:4]))
        rows[tuple(row[:4])] = row if there is None else _together(there, row)
    return {**mine[0], "meters": [*rows.values()]}


def _emptied(row: list[Any]) -> list[Any]:
    """A meter that has taken in nothing."""
    *which, options, _, total, _, metric = row
    nothing = {"min": math.inf, "max": -math.inf}.get(options[4], 0.0)
    total = torch.full_like(total, nothing) if isinstance(total, Tensor) else None if total is None else nothing
    return [*which, options, None, total, 0.0, metric]


def _together(one: list[Any], other: list[Any]) -> list[Any]:
    *which, options, last, total, weight, metric = one
    *_, more, more_weight, _ = other
    if total is None or more is None:
        total = more if total is None else total
    else:
        reduce_fx = options[4]
        total = extreme(reduce_fx, total, more) if reduce_fx in ("min", "max") else total + more
    return [*which, options, last, total, weight + more_weight, metric]


def metrics(of_each: list[dict[str, Any]], parts: dict[str, Any], path: Path) -> dict[str, Any]:
    """The states of torchmetrics objects that this process takes over, each merged by the metric's own rules.

    Args:
        of_each: States by name, of every process that there was.
        parts: The module's parts by name.
        path: The checkpoint.

    Raises:
        MisconfigurationException: A metric has no rule; in every process.
    """
    if len(of_each) > distributed.data_world_size():
        names = dict.fromkeys(name for states in of_each for name in states)
        fixed = [name for name in names if is_metric(parts.get(name)) and not _has_rules(parts[name])]
        if fixed:
            raise MisconfigurationException(
                f"checkpoint {path} cannot go on with fewer processes than {len(of_each)}: nobody knows how to merge "
                f"the running values of {', '.join(fixed)}; take a checkpoint of the end of an epoch"
            )
    merged: dict[str, Any] = {}
    for states in taken_over(of_each):
        for name, state in states.items():
            known = name in merged and is_metric(parts.get(name))
            merged[name] = _merged(parts[name], merged[name], state) if known else state
    return merged


def _has_rules(metric: Metric) -> bool:
    return all(isinstance(metric._defaults[name], list) or metric._reductions[name] for name in metric._defaults)


def _merged(metric: Metric, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, default in metric._defaults.items():
        pair, reduce_fx = [one["values"][name], other["values"][name]], metric._reductions[name]
        if isinstance(default, list):
            values[name] = [*pair[0], *pair[1]]
        elif callable(reduce_fx):
            values[name] = reduce_fx(torch.stack(pair))
    return {"values": values, "updates": one["updates"] + other["updates"]}


def gradients(t: Trainer, of_each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients that this process goes on with: of other processes than before, or in parts, all have the mean."""
    if len(of_each) == distributed.data_world_size() and t.device_mesh is None:
        return of_each[distributed.data_rank()]
    names = dict.fromkeys(name for own in of_each for name in own)
    return {name: sum(own[name] for own in of_each if name in own) / len(of_each) for name in names}  # type: ignore[misc]


def restore_random(t: Trainer, of_each: list[dict[str, Any]]) -> None:
    """Put back the random numbers of this process; those of other processes than before are drawn anew."""
    if len(of_each) == distributed.data_world_size():
        restore_rng(of_each[distributed.data_rank()])
        return
    distributed.rank_zero_warn(
        f"saved by {len(of_each)} processes, going on with {distributed.data_world_size()}: samples go on where they "
        "were, but what the model draws at random is drawn anew, from (seed, global_step, rank)"
    )
    number = mix(t.state.seed, t.state.global_step, distributed.data_rank())
    seed_cpu(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)

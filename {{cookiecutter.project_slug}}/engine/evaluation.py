"""Evaluation, within fit and on its own: the validation, test and predict loaders, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed
from engine.callback import Callback, Hook, P
from engine.exceptions import MisconfigurationException
from engine.fsdp import NO_BATCH, evaluated_together
from engine.hook_checks import check_dataloader_idx
from engine.hooks import ModelHooks, convert, is_overridden, move_to_device
from engine.meters import Meter
from engine.metrics import Scope
from engine.profilers import fetched
from engine.reading import UNKNOWN

if TYPE_CHECKING:
    from engine.trainer import Trainer

CPU = torch.device("cpu")


def evaluate(t: Trainer, stage: str, outputs: list[list[Any]] | None = None) -> list[dict[str, float]]:
    """Run the "validation", "test" or "predict" loaders; validation inside fit as well as on its own.

    Args:
        t: The trainer.
        stage: Which of them.
        outputs: Takes what the steps return, on the CPU: a list for each loader. None drops it.

    Returns:
        One dict of logged epoch values per loader; what sets with names have in common is in each.
    """
    sets = t.evaluation_loaders(stage)
    if not sets.readers and t.stage != "fit":
        raise MisconfigurationException(f"there is nothing to {t.stage} on; give dataloaders, or write their hook")
    some = distributed.all_gather([bool(count) for count in sets.counts])
    if not any(map(any, some)):
        return []
    if some.count(some[0]) < len(some):
        raise MisconfigurationException(NO_BATCH)
    check_dataloader_idx(t, stage)
    metrics = t.metrics
    metrics.samples, metrics.stage, metrics.scope = dict.fromkeys(sets.names, 0), stage, None
    logging = None if stage == "predict" else Scope.EPOCH
    # Batch norms count in each process; the checkpoint has the first one's, and so all evaluate with them.
    distributed.broadcast_tensors(t.module.buffers())
    with evaluation_mode(t, stage):
        metrics.scope = logging
        call_both(t, getattr(Callback, f"on_{stage}_start"))
        call_both(t, getattr(Callback, f"on_{stage}_epoch_start"))
        for index, metrics.loader in enumerate(sets.tags):
            kept = evaluate_loader(t, stage, index, keep=outputs is not None)
            if outputs is not None:
                outputs.append(kept)
        metrics.loader, metrics.scope = None, logging
        if broken_off(t):
            metrics.reset(stage)
            results = []
        else:
            metrics.epoch_reached = logging is not None
            call_both(t, getattr(Callback, f"on_{stage}_epoch_end"))
            results = metrics.flush_epoch()
            t.log_metrics(by_name(results), t.log_step if t.stage == "fit" else t.state.batches_that_stepped)
            if t.before_validation is not None:
                t.state.validated, t.before_validation = True, None
        metrics.scope = None
        call_both(t, getattr(Callback, f"on_{stage}_end"))
    # What is of no single loader belongs to every one.
    owner = "loader" if sets.names else "home"
    return [by_name([r for r in results if getattr(r[0], owner) in (None, tag)]) for tag in sets.tags]


def broken_off(t: Trainer, together: bool = False) -> bool:
    """Whether to leave an evaluation where it stands, since training is to stop; it is done again after a resume.

    Args:
        t: The trainer.
        together: All processes ask for this batch.
    """
    if t.stage != "fit" or not distributed.active():
        return t.stage == "fit" and bool(t.stop.pending())
    if together:
        t.interruption = t.interruption or t.stop.agreed()
    return bool(t.interruption)


def batches_of_all(t: Trainer, count: int | float) -> int | float:
    """How many batches of a loader every process has, where they may have to stop at one of them; of `count` here."""
    if t.stage != "fit" or not distributed.active():
        return 0
    t.interruption = t.interruption or t.stop.agreed_anew()
    least, most = min(counts := distributed.all_gather(count)), max(counts)
    return 0 if most == UNKNOWN else least


@contextmanager
def evaluation_mode(t: Trainer, stage: str) -> Iterator[None]:
    """Evaluate without gradients and in evaluation mode; every submodule gets its own mode back, come what may."""
    # Inference mode only on its own: within fit weights change again, and across processes gloo needs no_grad.
    inference = t.inference_mode and t.stage != "fit" and not distributed.active()
    modes, to_train = [(part, part.training) for part in t.module.modules()], f"on_{stage}_model_train"
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            getattr(t.module, f"on_{stage}_model_eval")()
            yield
            if is_overridden(t.module, to_train, ModelHooks):
                modes = []
                getattr(t.module, to_train)()
    finally:
        for part, training in modes:
            part.training = training


def evaluate_loader(t: Trainer, stage: str, index: int, keep: bool) -> list[Any]:
    """Run the batches of one loader; returns what the steps gave, if it is to be kept."""
    metrics, sets = t.metrics, t.evaluation_loaders(stage)
    step, reader = t.steps[f"{stage}_step"], sets.readers[index]
    start, end = getattr(Callback, f"on_{stage}_batch_start"), getattr(Callback, f"on_{stage}_batch_end")
    scope = None if stage == "predict" else Scope.EVAL_BATCH
    kept: list[Any] = []
    together = batches_of_all(t, sets.counts[index])
    batches = reader.epoch(t.state.seed, 0, count=sets.counts[index])
    if distributed.joined():
        batches = evaluated_together(t.module, batches)
    for batch_idx, batch, _ in fetched(t.profiler, f"{stage}_dataloader_next", batches):
        if broken_off(t, together=batch_idx < together):
            break
        batch = to_device(t, batch, index)
        metrics.begin_batch(scope, batch)
        which = (batch_idx,) if metrics.loader is None else (batch_idx, index)
        if f"on_{stage}_batch_start" in t.hooked:
            call_both(t, start, batch, *which)
        with t.precision_plugin.context:
            outputs = step(batch, *(which if t.takes_batch_idx[f"{stage}_step"] else ()))
        if f"on_{stage}_batch_end" in t.hooked:
            call_both(t, end, outputs, batch, *which)
        metrics.scope = None
        values = metrics.flush_step()
        if not t.sanity_checking:
            # Every loader has a step counter of its own.
            if values:
                t.log_metrics(values, t.evaluation_steps[stage, metrics.loader], with_epoch=False)
            t.evaluation_steps[stage, metrics.loader] += 1
        if keep:
            kept.append(move_to_device(outputs, CPU))
    return kept


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether a step wants the number of its batch: it has two parameters or more, or takes any number."""
    # FSDP2, and the engine, wrap steps that are bound already.
    while inspect.ismethod(wrapped := getattr(step, "__wrapped__", None)):
        step = wrapped
    parameters = inspect.signature(step).parameters.values()
    return len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def to_device(t: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Run the three transfer hooks, those of them that somebody overrides.

    A GPU copies on a stream of its own: while it still computes what came before, as the process runs ahead of it.
    """
    if t.precision_plugin.dtype is not None:
        batch = t.precision_plugin.convert_input(batch)
    before, move, after = t.transfer_hooks
    if before is not None:
        batch = before(batch, dataloader_idx)
    if move is not None:
        batch = move(batch, t.device, dataloader_idx)
    elif t.copy_stream is None:
        batch = move_to_device(batch, t.device)
    else:
        batch = copy_beside(batch, t.device, t.copy_stream)
    return batch if after is None else after(batch, dataloader_idx)


def copy_beside(batch: Any, device: torch.device, stream: torch.cuda.Stream) -> Any:
    """The same structure with every tensor on a GPU, plain tensors copied on a stream of their own."""
    computing = torch.cuda.current_stream(device)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            return tensor.to(device, non_blocking=True)
        with torch.cuda.stream(stream):
            moved = tensor.to(device, non_blocking=True)
        # So that its memory is not used again before the computation has read it.
        moved.record_stream(computing)
        return moved

    # Objects that move themselves do so where the computation can see it: nobody knows which tensors are in them.
    batch = convert(batch, copied, other=lambda value: value.to(device))
    computing.wait_stream(stream)
    return batch


def call_both(t: Trainer, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> Any:
    """Call `hook` on the callbacks, then on the module if it overrides it; returns the module's answer."""
    name, module = hook.__name__, t.module
    for bound in t.overrides[name]:
        bound(t, module, *args, **kwargs)
    own = t.module_hooks.get(name)
    return None if own is None else own(*args, **kwargs)


def by_name(results: list[tuple[Meter, float]]) -> dict[str, float]:
    """Results of a flush as they are logged."""
    return {meter.label("_epoch"): value for meter, value in results if meter.options.logger}

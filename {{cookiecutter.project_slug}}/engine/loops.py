"""The loops, read top-down: fit, epoch, batch, optimizer step; evaluation; prediction.

    fit_epochs -> train_epoch -> train_batch -> forward_backward -> Module.training_step
                                             -> optimizer_step
                              -> evaluate    -> Module.validation_step

`t` is the trainer. Hooks run callbacks first, then the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import distributed
from engine.callback import Callback, Hook, P
from engine.data import batches, start_epoch
from engine.exceptions import MisconfigurationException
from engine.hooks import move_to_device
from engine.metrics import Meter, Scope
from engine.optim import step_schedulers
from engine.seed import isolated_rng

if TYPE_CHECKING:
    from engine.trainer import Trainer

CPU = torch.device("cpu")


@dataclass
class TrainState:
    """Where training stands. A checkpoint holds the state before the next batch.

    Attributes:
        seed: Seed of the order of samples.
        epoch: Finished epochs.
        batches_done: Batches done in the current epoch.
        global_step: Completed optimizer steps.
        epoch_over: The current epoch is finished but for the callbacks that monitor it.
    """

    seed: int
    epoch: int = 0
    batches_done: int = 0
    global_step: int = 0
    epoch_over: bool = False


def fit_epochs(t: Trainer) -> None:
    """Train until `stop_reason(t)` names a reason."""
    t.metrics.stage, t.metrics.scope = "train", Scope.EPOCH
    call_both(t, Callback.on_train_start)
    while stop_reason(t) is None:
        train_epoch(t)
    t.metrics.scope = None
    call_both(t, Callback.on_train_end)


def train_epoch(t: Trainer) -> None:
    """Run one epoch: its batches, its validation, its end."""
    state, metrics, module = t.state, t.metrics, t.module
    loader, count = t.loaders.train()
    start_epoch(loader, state.seed, state.epoch)
    metrics.scope = Scope.EPOCH
    metrics.fresh.clear()
    call_both(t, Callback.on_train_epoch_start)
    skip_rest = None
    for batch_idx, batch, t.is_last_batch in batches(loader, count):
        skip_rest = train_batch(t, batch, batch_idx)
        metrics.scope = None
        # Not within a window of accumulated gradients, which would be lost.
        stopping = ends_window(t, batch_idx) and stop_reason(t) is not None
        due = t.is_last_batch or stopping
        if due and not skip_rest and t.validates and (state.epoch + 1) % t.check_val_every_n_epoch == 0:
            module.on_validation_model_zero_grad()
            evaluate(t, "validation")
            metrics.stage = "train"
        if skip_rest or stopping:
            break
    if skip_rest is None:
        raise MisconfigurationException(f"the train loader gave no batch in epoch {state.epoch}; check its data")
    metrics.scope = Scope.EPOCH
    call_both(t, Callback.on_train_epoch_end)
    t.log_metrics(_by_name(metrics.flush_epoch()), t.log_step)
    metrics.scope = None
    step_schedulers(t.lr_scheduler_configs, "epoch", state.epoch + 1, metrics)
    # A run cut short by max_steps within an epoch stays within it; every other way of leaving the batches ends it.
    state.epoch_over = t.is_last_batch or not step_limit_reached(t)
    # ModelCheckpoint, EarlyStopping and others that watch metrics.
    for callback in t.callbacks:
        if callback.monitoring:
            callback.on_train_epoch_end(t, module)
    if state.epoch_over:
        state.epoch, state.batches_done, state.epoch_over = state.epoch + 1, 0, False


def step_limit_reached(t: Trainer) -> bool:
    """Whether `max_steps` optimizer steps are done."""
    return t.max_steps != -1 and t.state.global_step >= t.max_steps


def stop_reason(t: Trainer) -> str | None:
    """Why training is over, or None while it goes on."""
    if step_limit_reached(t):
        return f"max_steps={t.max_steps} reached"
    if t.max_epochs != -1 and t.state.epoch >= t.max_epochs:
        return f"max_epochs={t.max_epochs} reached"
    if t.should_stop and t.state.epoch >= t.min_epochs and t.state.global_step >= t.min_steps:
        return "should_stop was set"
    return None


def ends_window(t: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch: it is the last of its accumulation window, or of the epoch."""
    return t.is_last_batch or (batch_idx + 1) % t.accumulate_grad_batches == 0


def train_batch(t: Trainer, batch: Any, batch_idx: int) -> bool:
    """Run one batch.

    Returns:
        Whether the module asked to skip the rest of the epoch, this batch included.
    """
    state, metrics = t.state, t.metrics
    batch = t.to_device(batch, 0)
    metrics.begin_batch(Scope.TRAIN_BATCH, batch)
    if call_both(t, Callback.on_train_batch_start, batch, batch_idx) == -1:
        return True
    stepping = ends_window(t, batch_idx)
    outputs = forward_backward(t, batch, batch_idx, nullcontext() if stepping else t.strategy.no_sync())
    state.batches_done = batch_idx + 1
    if stepping:
        optimizer_step(t, window=batch_idx % t.accumulate_grad_batches + 1)
        step_schedulers(t.lr_scheduler_configs, "step", state.global_step)
    if t.is_last_batch:
        step_schedulers(t.lr_scheduler_configs, "epoch", state.epoch + 1)
    call_both(t, Callback.on_train_batch_end, outputs, batch, batch_idx)
    if stepping:
        if state.global_step % t.log_every_n_steps == 0:
            t.log_metrics(metrics.flush_step(), t.log_step)
        step_schedulers(t.lr_scheduler_configs, "step", state.global_step, metrics)
    return False


def forward_backward(t: Trainer, batch: Any, batch_idx: int, no_sync: AbstractContextManager[None]) -> dict[str, Any]:
    """Add the gradients of one batch.

    Gradients of the previous window are cleared between forward and backward, as in Lightning.

    Returns:
        What `on_train_batch_end` gets: the detached loss, divided by the accumulation, and the step's other values.
    """
    module, precision = t.module, t.precision_plugin
    with no_sync:
        with precision.context:
            output = t.strategy.training_step(*((batch, batch_idx) if t.step_takes_batch_idx else (batch,)))
        loss, extra = _split_output(output)
        if batch_idx % t.accumulate_grad_batches == 0:
            optimizer = t.optimizers[0]
            call_both(t, Callback.on_before_zero_grad, optimizer)
            module.optimizer_zero_grad(t.current_epoch, batch_idx, optimizer)
        if loss is None and distributed.active():
            raise MisconfigurationException(
                "training_step returned None, but other processes wait for its gradients; return a loss of 0 * outputs"
            )
        if loss is None:
            return extra
        if t.accumulate_grad_batches > 1:
            loss = loss / t.accumulate_grad_batches
        scaled = precision.scale(loss)
        call_both(t, Callback.on_before_backward, scaled)
        module.backward(scaled)
        call_both(t, Callback.on_after_backward)
    return {**extra, "loss": loss.detach()}


def optimizer_step(t: Trainer, window: int) -> None:
    """Unscale and clip the gradients of a window of `window` batches, and update the weights."""
    module, precision, optimizer = t.module, t.precision_plugin, t.optimizers[0]
    precision.unscale(optimizer)
    if window < t.accumulate_grad_batches:
        # Every loss was divided by the full window, but this one, at the epoch's end, is shorter.
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, t.accumulate_grad_batches / window)
    call_both(t, Callback.on_before_optimizer_step, optimizer)
    module.configure_gradient_clipping(optimizer, t.gradient_clip_val, t.gradient_clip_algorithm)
    precision.step(optimizer)
    t.state.global_step += 1


def sanity_check(t: Trainer) -> None:
    """Run a few validation batches before training, and leave no trace of them."""
    t.sanity_checking = True
    with isolated_rng():
        t.call(Callback.on_sanity_check_start)
        evaluate(t, "validation")
        t.call(Callback.on_sanity_check_end)
    t.sanity_checking = False
    t.metrics.clear()


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
    if not sets.loaders and t.stage != "fit":
        raise MisconfigurationException(f"there is nothing to {t.stage} on; give dataloaders, or write their hook")
    if not any(sets.counts):
        return []
    metrics = t.metrics
    metrics.samples = dict.fromkeys(sets.names, 0)
    metrics.stage, metrics.scope = stage, None
    logging = None if stage == "predict" else Scope.EPOCH
    with evaluation_mode(t, stage):
        metrics.scope = logging
        call_both(t, getattr(Callback, f"on_{stage}_start"))
        call_both(t, getattr(Callback, f"on_{stage}_epoch_start"))
        for index, metrics.loader in enumerate(sets.tags):
            kept = evaluate_loader(t, stage, index, keep=outputs is not None)
            if outputs is not None:
                outputs.append(kept)
        metrics.loader, metrics.scope = None, logging
        call_both(t, getattr(Callback, f"on_{stage}_epoch_end"))
        results = metrics.flush_epoch()
        metrics.scope = None
        t.log_metrics(_by_name(results), t.log_step)
        call_both(t, getattr(Callback, f"on_{stage}_end"))
    # What is of no single loader belongs to every one.
    return [_by_name([r for r in results if r[0].loader in (None, tag)], every=True) for tag in sets.tags]


@contextmanager
def evaluation_mode(t: Trainer, stage: str) -> Iterator[None]:
    """Evaluate without gradients and in evaluation mode; every submodule gets its own mode back, come what may."""
    # Inference mode only on its own: within fit weights change again, and across processes gloo needs no_grad.
    inference = t.inference_mode and t.stage != "fit" and not distributed.active()
    modes = [(part, part.training) for part in t.module.modules()]
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            getattr(t.module, f"on_{stage}_model_eval")()
            yield
    finally:
        for part, training in modes:
            part.training = training


def evaluate_loader(t: Trainer, stage: str, index: int, keep: bool) -> list[Any]:
    """Run the batches of one loader; returns what the steps gave, if it is to be kept."""
    metrics, sets = t.metrics, t.evaluation_loaders(stage)
    step = getattr(t.module, f"{stage}_step")
    start, end = getattr(Callback, f"on_{stage}_batch_start"), getattr(Callback, f"on_{stage}_batch_end")
    scope = None if stage == "predict" else Scope.EVAL_BATCH
    kept: list[Any] = []
    start_epoch(sets.loaders[index], t.state.seed, 0)
    for batch_idx, batch, _ in batches(sets.loaders[index], sets.counts[index]):
        batch = t.to_device(batch, index)
        metrics.begin_batch(scope, batch)
        which = (batch_idx,) if metrics.loader is None else (batch_idx, index)
        call_both(t, start, batch, *which)
        with t.precision_plugin.context:
            outputs = step(batch, *which)
        call_both(t, end, outputs, batch, *which)
        metrics.scope = None
        if (values := metrics.flush_step()) and not t.sanity_checking:
            # Every loader has a step counter of its own.
            t.log_metrics(values, t.evaluation_steps[stage, metrics.loader])
            t.evaluation_steps[stage, metrics.loader] += 1
        if keep:
            kept.append(move_to_device(outputs, CPU))
    return kept


def call_both(t: Trainer, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> Any:
    """Call `hook` on the callbacks, then on the module, whose answer is returned."""
    t.call(hook, *args, **kwargs)
    return getattr(t.module, hook.__name__)(*args, **kwargs)


def _split_output(output: Any) -> tuple[Tensor | None, dict[str, Any]]:
    if output is None:
        return None, {}
    loss = output
    extra: dict[str, Any] = {}
    if isinstance(output, Mapping):
        loss = output.get("loss")
        extra = {k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items() if k != "loss"}
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"training_step returned {type(output).__name__}; return the loss (a tensor), a dict with 'loss', or None"
        )
    if loss.numel() != 1 or not loss.requires_grad:
        fault = f"of shape {tuple(loss.shape)}" if loss.numel() != 1 else "without gradient"
        raise MisconfigurationException(f"training_step returned a loss {fault}; return one number with a gradient")
    return loss, extra


def _by_name(results: list[tuple[Meter, float]], every: bool = False) -> dict[str, float]:
    return {meter.label("_epoch"): value for meter, value in results if every or meter.options.logger}

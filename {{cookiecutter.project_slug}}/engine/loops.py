"""The loops, read top-down: fit, epoch, batch, optimizer step; evaluation; prediction.

    fit_epochs -> train_epoch -> train_batch -> forward_backward -> Module.training_step
                                             -> optimizer_step
                              -> evaluate    -> Module.validation_step

`t` is the trainer. Hooks run callbacks first, then the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import distributed
from engine.callback import Callback, Hook, P
from engine.exceptions import MisconfigurationException
from engine.faults import check_losses, watch_loss
from engine.hooks import move_to_device
from engine.metrics import Meter, Scope
from engine.optim import step_schedulers
from engine.resume import moment
from engine.seed import isolated_rng
from engine.signals import NAMES, leave

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
        step_open: A step is done but for what is logged of it.
        validated: After the last batch, validation has run.
        epoch_over: The current epoch is finished but for the callbacks that monitor it.
    """

    seed: int
    epoch: int = 0
    batches_done: int = 0
    global_step: int = 0
    step_open: bool = False
    validated: bool = False
    epoch_over: bool = False


def fit_epochs(t: Trainer) -> None:
    """Train until `stop_reason(t)` names a reason, or somebody asks to stop."""
    t.metrics.stage, t.metrics.scope = "train", Scope.EPOCH
    call_both(t, Callback.on_train_start)
    while stop_reason(t) is None and not interrupted(t):
        train_epoch(t)
    if interrupted(t):
        preserve(t)
        leave(t.interruption)
    t.metrics.scope = None
    call_both(t, Callback.on_train_end)


def train_epoch(t: Trainer) -> None:
    """Run one epoch, or what is left of it: its batches, its validation, its end."""
    state, metrics = t.state, t.metrics
    metrics.scope = Scope.EPOCH
    if state.step_open:
        # Resumed from a checkpoint that a hook at the end of a batch saved.
        finish_step(t)
    if not state.batches_done:
        metrics.fresh.clear()
        call_both(t, Callback.on_train_epoch_start)
    skip_rest = train_batches(t)
    if not skip_rest and not t.interruption:
        validate_in_fit(t)
    if interrupted(t):
        return
    metrics.scope = Scope.EPOCH
    call_both(t, Callback.on_train_epoch_end)
    check_losses(t)
    t.log_metrics(_by_name(metrics.flush_epoch()), t.log_step)
    metrics.scope = None
    step_schedulers(t.lr_scheduler_configs, "epoch", state.epoch + 1, metrics)
    # A run cut short by max_steps within an epoch stays within it; every other way of leaving the batches ends it.
    state.epoch_over = t.is_last_batch or not step_limit_reached(t)
    # ModelCheckpoint, EarlyStopping and others that watch metrics.
    t.call_monitoring(Callback.on_train_epoch_end)
    if state.epoch_over:
        state.epoch, state.batches_done, state.epoch_over, state.validated = state.epoch + 1, 0, False, False


def train_batches(t: Trainer) -> bool:
    """Run the batches of an epoch until its end, the end of the run, or an interruption.

    Returns:
        Whether the module asked to skip the rest of the epoch.
    """
    state = t.state
    # An epoch that was left after its last batch has no more.
    t.is_last_batch = bool(state.batches_done)
    batches = t.loaders.train().epoch(state.seed, state.epoch, state.batches_done)
    for batch_idx, batch, t.is_last_batch in batches:
        skip_rest = train_batch(t, batch, batch_idx)
        t.metrics.scope = None
        t.writer.check()
        # Not within a window of accumulated gradients, which would be lost.
        if skip_rest or (ends_window(t, batch_idx) and (interrupted(t) or stop_reason(t) is not None)):
            return skip_rest
    if not state.batches_done:
        raise MisconfigurationException(f"the train loader gave no batch in epoch {state.epoch}; check its data")
    return False


def validate_in_fit(t: Trainer) -> None:
    """Validate after the batches of an epoch, if that is due and has not been done before the run was resumed."""
    due = t.validates and (t.state.epoch + 1) % t.check_val_every_n_epoch == 0
    if due and not t.state.validated:
        # What is saved until the validation is over is the state before it; also if it is broken off.
        t.before_validation = deepcopy(moment(t))
        t.module.on_validation_model_zero_grad()
        evaluate(t, "validation")
        t.metrics.stage = "train"


def preserve(t: Trainer) -> None:
    """Save a run that is interrupted, as `last.ckpt` of its first ModelCheckpoint."""
    path = None
    if t.checkpoint_callback is not None and not t.fast_dev_run:
        path = t.checkpoint_callback.save_last_now(t)
    t.before_validation = None
    if t.is_global_zero:
        saved = f"saved {path}" if path else "nothing was saved, since checkpointing is off"
        print(f"\n{NAMES[t.interruption]}: stopped after {t.state.global_step} steps; {saved}", flush=True)


def interrupted(t: Trainer) -> bool:
    """Whether somebody outside has asked to stop; to be asked by all processes at the same step."""
    t.interruption = t.interruption or t.stop.agreed()
    return bool(t.interruption)


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
    batch = to_device(t, batch, 0)
    metrics.begin_batch(Scope.TRAIN_BATCH, batch)
    if call_both(t, Callback.on_train_batch_start, batch, batch_idx) == -1:
        return True
    stepping = ends_window(t, batch_idx)
    outputs = forward_backward(t, batch, batch_idx, nullcontext() if stepping else t.strategy.no_sync())
    watch_loss(t, batch_idx, outputs.get("loss"))
    state.batches_done, state.validated = batch_idx + 1, False
    if stepping:
        optimizer_step(t, window=batch_idx % t.accumulate_grad_batches + 1)
        step_schedulers(t.lr_scheduler_configs, "step", state.global_step)
    if t.is_last_batch:
        step_schedulers(t.lr_scheduler_configs, "epoch", state.epoch + 1)
    state.step_open = stepping
    call_both(t, Callback.on_train_batch_end, outputs, batch, batch_idx)
    if stepping:
        finish_step(t)
    t.call_monitoring(Callback.on_train_batch_end, outputs, batch, batch_idx)
    return False


def finish_step(t: Trainer) -> None:
    """Hand on what an optimizer step has logged."""
    metrics, step = t.metrics, t.state.global_step
    if step % t.log_every_n_steps == 0:
        t.log_metrics(metrics.flush_step(), t.log_step)
        check_losses(t)
    step_schedulers(t.lr_scheduler_configs, "step", step, metrics)
    t.state.step_open = False


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
    if not sets.readers and t.stage != "fit":
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
        if broken_off(t):
            metrics.reset(stage)
            results = []
        else:
            call_both(t, getattr(Callback, f"on_{stage}_epoch_end"))
            results = metrics.flush_epoch()
            t.log_metrics(_by_name(results), t.log_step)
            if t.before_validation is not None:
                t.state.validated, t.before_validation = True, None
        metrics.scope = None
        call_both(t, getattr(Callback, f"on_{stage}_end"))
    # What is of no single loader belongs to every one.
    return [_by_name([r for r in results if r[0].loader in (None, tag)], every=True) for tag in sets.tags]


def broken_off(t: Trainer) -> bool:
    """Whether to leave an evaluation where it stands, since training is to stop; it is done again after a resume."""
    # Processes have different numbers of evaluation batches, and so no step at which to agree.
    return t.stage == "fit" and not distributed.active() and bool(t.stop.pending())


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
    step, reader = getattr(t.module, f"{stage}_step"), sets.readers[index]
    start, end = getattr(Callback, f"on_{stage}_batch_start"), getattr(Callback, f"on_{stage}_batch_end")
    scope = None if stage == "predict" else Scope.EVAL_BATCH
    kept: list[Any] = []
    for batch_idx, batch, _ in reader.epoch(t.state.seed, 0, count=sets.counts[index]):
        if broken_off(t):
            break
        batch = to_device(t, batch, index)
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


def to_device(t: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Run the three transfer hooks."""
    before, move, after = t.transfer_hooks
    return after(move(before(batch, dataloader_idx), t.device, dataloader_idx), dataloader_idx)


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

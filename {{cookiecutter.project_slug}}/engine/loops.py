"""The loops, read top-down: fit, epoch, batch, optimizer step.

    fit_epochs -> train_epoch -> train_batches -> train_batch -> optimization.forward_backward -> Module.training_step
                                               -> leaves_epoch -> evaluation.evaluate -> Module.validation_step

`t` is the trainer. Hooks run callbacks first, then the module.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from engine import distributed, optimization
from engine.callback import Callback
from engine.evaluation import by_name, call_both, evaluate, to_device
from engine.exceptions import MisconfigurationException
from engine.faults import check_losses, watch_loss
from engine.metrics import Scope
from engine.optimization import PREPARING, detached, forward_backward, prepare_gradients, step_learning_rates
from engine.profilers import fetched
from engine.resume import moment
from engine.seed import isolated_rng
from engine.signals import NAMES, leave

if TYPE_CHECKING:
    from engine.trainer import Trainer


@dataclass
class TrainState:
    """Where training stands. A checkpoint holds the state before the next batch.

    Attributes:
        seed: Seed of the order of samples.
        epoch: Finished epochs.
        batches_done: Batches done in the current epoch, or the number of the next one: after a resume with batches of
            another size they are counted as if all before had been of this size.
        samples_done: Samples of the current epoch's order that all processes together have had, which is where the
            next batch begins; 0 where the order is not `EpochSampler`'s.
        total_batches: Batches done in all epochs.
        global_step: Completed optimizer steps, of all optimizers together.
        batches_that_stepped: Batches after which an optimizer has stepped: the x-axis of the logs.
        last_batch: The batch done last was the last of its epoch.
        step_open: A step is done but for what is logged of it.
        plateau_open: Nor have schedulers stepped that follow a value, which validation may bring.
        validated: After the last batch, validation has run.
        epoch_over: The current epoch is finished but for the callbacks that monitor it.
    """

    seed: int
    epoch: int = 0
    batches_done: int = 0
    samples_done: int = 0
    total_batches: int = 0
    global_step: int = 0
    batches_that_stepped: int = 0
    last_batch: bool = False
    step_open: bool = False
    plateau_open: bool = False
    validated: bool = False
    epoch_over: bool = False


def fit_epochs(t: Trainer) -> None:
    """Train until `stop_reason(t)` names a reason, or somebody asks to stop."""
    t.metrics.stage, t.metrics.scope = "train", Scope.EPOCH
    call_both(t, Callback.on_train_start)
    t.last_validation = time.monotonic()
    while stop_reason(t) is None and not interrupted(t):
        train_epoch(t)
    if interrupted(t, now=True):
        preserve(t)
        leave(t.interruption)
    t.metrics.scope = None
    call_both(t, Callback.on_train_end)


def train_epoch(t: Trainer) -> None:
    """Run one epoch, or what is left of it: its batches, its validation, its end."""
    state, metrics = t.state, t.metrics
    t.reload_dataloaders()
    # How often to validate within an epoch, in batches; inf: after its last one.
    t.val_check_batch = t.batches_between_validations()
    metrics.scope = Scope.EPOCH
    if state.step_open:
        # Resumed from a checkpoint that a hook at the end of a batch saved.
        finish_step(t)
    if not state.batches_done:
        metrics.fresh.clear()
        call_both(t, Callback.on_train_epoch_start)
    skip_rest = train_batches(t)
    if interrupted(t, now=True):
        return
    metrics.scope, metrics.epoch_reached = Scope.EPOCH, True
    call_both(t, Callback.on_train_epoch_end)
    check_losses(t)
    # A run cut short by max_steps within an epoch stays within it; every other way of leaving the batches ends it.
    over = skip_rest or t.is_last_batch or not step_limit_reached(t)
    t.log_metrics(by_name(metrics.flush_epoch(reset=over)), t.log_step)
    metrics.scope, state.epoch_over = None, over
    if skip_rest or t.is_last_batch:
        step_learning_rates(t, "epoch", state.epoch + 1, plateau=True)
    # ModelCheckpoint, EarlyStopping and others that watch metrics.
    t.call_monitoring(Callback.on_train_epoch_end)
    if state.epoch_over:
        state.epoch, state.batches_done, state.samples_done = state.epoch + 1, 0, 0
        state.epoch_over = state.validated = False


def train_batches(t: Trainer) -> bool:
    """Run the batches of an epoch until its end, the end of the run, or an interruption.

    Returns:
        Whether the module asked to skip the rest of the epoch.
    """
    state = t.state
    # An epoch that was left after its last batch has no more.
    t.is_last_batch = state.last_batch and bool(state.batches_done)
    if (state.batches_done and leaves_epoch(t)) or stop_reason(t) is not None:
        return False
    reader = t.loaders.train()
    batches = reader.epoch(state.seed, state.epoch, state.batches_done, state.samples_done)
    batches = fetched(t.profiler, "train_dataloader_next", batches)
    for batch_idx, batch, t.is_last_batch in batches:
        skip_rest = train_batch(t, batch, batch_idx, reader.samples_done)
        t.metrics.scope = None
        if t.writer.error is not None:
            t.writer.check()
        # After the last batch the loader is read to its end first, so that its state says so.
        if skip_rest or (not t.is_last_batch and leaves_epoch(t)):
            return skip_rest
    if not state.batches_done:
        raise MisconfigurationException(f"the train loader gave no batch in epoch {state.epoch}; check its data")
    if not t.is_last_batch:
        # The loader gave fewer batches than it said, or other processes than before share none of what is left.
        t.is_last_batch = state.last_batch = True
        step_learning_rates(t, "epoch", state.epoch + 1)
    leaves_epoch(t)
    return False


def leaves_epoch(t: Trainer) -> bool:
    """Validate after a batch, if that is due; returns whether the epoch ends here, before the loader does."""
    # Not within a window of accumulated gradients, which would be lost.
    state = t.state
    at_step = t.is_last_batch or state.batches_done % t.accumulate_grad_batches == 0
    if at_step and interrupted(t):
        return True
    # What ends most runs, `max_epochs`, does so between epochs; a hook may lower it.
    may_stop = t.should_stop or t.max_steps != -1 or t.max_epochs <= state.epoch
    stopping = at_step and may_stop and stop_reason(t) is not None
    if (stopping or t.is_last_batch or t.val_check_batch < inf) and validation_due(t, stopping):
        validate_in_fit(t, at_step)
        # One that was broken off is done again from here, also within a window: its gradients are saved then.
        if (at_step or t.before_validation is not None) and interrupted(t):
            return True
        stopping = at_step and stop_reason(t) is not None
    if state.plateau_open:
        if t.lr_scheduler_configs:
            step_learning_rates(t, "step", state.batches_that_stepped, plateau=True)
        state.plateau_open = False
    return stopping


def validation_due(t: Trainer, stopping: bool) -> bool:
    """Whether to validate after the batch that is done: at the interval that was asked for, and before a run stops."""
    state, every = t.state, t.check_val_every_n_epoch
    if state.validated:
        return False
    if t.val_check_time is not None:
        due = distributed.broadcast(time.monotonic() - t.last_validation >= t.val_check_time)
    elif t.val_check_batch == inf:
        due = t.is_last_batch
    else:
        due = (state.total_batches if every is None else state.batches_done) % t.val_check_batch == 0
    return (due or stopping) and validates_in_epoch(t)


def validates_in_epoch(t: Trainer) -> bool:
    """Whether validation runs in the current epoch."""
    return t.enable_validation and (t.state.epoch + 1) % (t.check_val_every_n_epoch or 1) == 0


def validate_in_fit(t: Trainer, at_step: bool) -> None:
    """Validate after a batch."""
    # What is saved until the validation is over is the state before it; also if it is broken off.
    t.before_validation = moment(t, apart=True)
    if at_step:
        t.module.on_validation_model_zero_grad()
    evaluate(t, "validation")
    if not t.validates:
        # There was nothing to validate on, after all.
        t.state.validated, t.before_validation = True, None
    t.metrics.stage, t.last_validation = "train", time.monotonic()


def preserve(t: Trainer) -> None:
    """Save a run that is interrupted, as `last.ckpt` of its first ModelCheckpoint."""
    path = None
    if t.checkpoint_callback is not None and not t.fast_dev_run:
        path = t.checkpoint_callback.save_last_now(t)
    t.before_validation = None
    if t.is_global_zero:
        saved = f"saved {path}" if path else "nothing was saved, since checkpointing is off"
        print(f"\n{NAMES[t.interruption]}: stopped after {t.state.global_step} steps; {saved}", flush=True)


def interrupted(t: Trainer, now: bool = False) -> bool:
    """Whether somebody outside has asked to stop; to be asked by all processes at the same step.

    Processes learn a little late of what others know, unless they wait for it `now`, as at the end of an epoch.
    """
    t.interruption = t.interruption or t.stop.agreed(now)
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


def train_batch(t: Trainer, batch: Any, batch_idx: int, samples_done: int) -> bool:
    """Run one batch.

    Args:
        t: The trainer.
        batch: The batch.
        batch_idx: Its number in the epoch.
        samples_done: What `TrainState.samples_done` is after it.

    Returns:
        Whether the module asked to skip the rest of the epoch, this batch included.
    """
    state, automatic = t.state, t.module.automatic_optimization
    batch = to_device(t, batch, 0)
    t.metrics.begin_batch(Scope.TRAIN_BATCH, batch)
    if "on_train_batch_start" in t.hooked and call_both(t, Callback.on_train_batch_start, batch, batch_idx) == -1:
        step_learning_rates(t, "step", state.batches_that_stepped)
        step_learning_rates(t, "epoch", state.epoch + 1)
        return True
    # After the last batch of an accumulation window, or of the epoch.
    stepping = t.is_last_batch or (batch_idx + 1) % t.accumulate_grad_batches == 0
    if not automatic:
        outputs = optimization.manual_step(t, batch, batch_idx)
    elif stepping and t.by_closure:
        outputs = optimization.step_by_closure(t, batch, batch_idx)
    elif stepping:
        outputs = forward_backward(t, batch, batch_idx)
        if t.gradient_clip_val or t.accumulate_grad_batches > 1 or not PREPARING.isdisjoint(t.hooked):
            prepare_gradients(t, t.optimizers[0])
        if "optimizer_step" in t.hooked:
            t.steps["optimizer_step"](t.optimizers[0])
        else:
            optimization.step_unrecorded(t.optimizers[0])
    else:
        with t.strategy.no_sync():
            outputs = forward_backward(t, batch, batch_idx)
    watch_loss(t, batch_idx, outputs.get("loss"))
    state.batches_done, state.total_batches, state.validated = batch_idx + 1, state.total_batches + 1, False
    state.samples_done, state.last_batch = samples_done, t.is_last_batch
    if stepping:
        state.global_step += automatic
        state.batches_that_stepped += 1
    state.step_open = state.plateau_open = stepping
    end_batch(t, outputs, batch, batch_idx)
    return False


def end_batch(t: Trainer, outputs: dict[str, Any], batch: Any, batch_idx: int) -> None:
    """After a batch: learning rates that follow the clock, hooks, and what was logged."""
    state = t.state
    if state.step_open and t.lr_scheduler_configs:
        step_learning_rates(t, "step", state.batches_that_stepped)
    if t.is_last_batch:
        step_learning_rates(t, "epoch", state.epoch + 1)
    monitors, hooked = t.late["on_train_batch_end"], "on_train_batch_end" in t.hooked
    if monitors or hooked:
        outputs = detached(outputs)
    if hooked:
        call_both(t, Callback.on_train_batch_end, outputs, batch, batch_idx)
    if state.step_open:
        finish_step(t)
    for monitor in monitors:
        monitor(t, t.module, outputs, batch, batch_idx)


def finish_step(t: Trainer) -> None:
    """Hand on what an optimizer step has logged."""
    step = t.state.batches_that_stepped
    if (t.log_every_n_steps and step % t.log_every_n_steps == 0) or t.should_stop:
        t.log_metrics(t.metrics.flush_step(), t.log_step)
        check_losses(t)
    t.state.step_open = False


def sanity_check(t: Trainer) -> None:
    """Run a few validation batches before training, and leave no trace of them."""
    t.sanity_checking = True
    with isolated_rng():
        t.call(Callback.on_sanity_check_start)
        evaluate(t, "validation")
        t.call(Callback.on_sanity_check_end)
    t.sanity_checking = False
    t.metrics.clear()

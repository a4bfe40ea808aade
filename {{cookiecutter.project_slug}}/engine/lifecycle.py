"""What surrounds the loops: checking arguments, attaching model and data, set-up, and tear-down come what may."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed, faults
from engine.callback import Callback, check_hook_names, is_overridden
from engine.data import Loaders
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks
from engine.module import DataModule, Module
from engine.signals import StopRequest, leave, quiet_children
from engine.strategy import Strategy

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Methods that do something in some version of Lightning and nothing here, and what to write instead: refused at the
# start rather than ignored.
UNSUPPORTED_HOOKS = {
    "optimizer_step": "on_before_optimizer_step",
    "lr_scheduler_step": "configure_optimizers",
    "configure_optimizer": "configure_optimizers",
    "val_step": "validation_step",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
    "training_step_end": "on_train_batch_end",
    "validation_step_end": "on_validation_batch_end",
    "test_step_end": "on_test_batch_end",
}
# Smallest value of each whole-number argument.
LEAST = {"max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "fast_dev_run": 0}
LEAST |= {"num_sanity_val_steps": -1, "check_val_every_n_epoch": 1}
LEAST |= {"log_every_n_steps": 1, "accumulate_grad_batches": 1}
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def run(t: Trainer, stage: str, model: Module, datamodule: DataModule | None, given: dict[str, Any]) -> Iterator[None]:
    """Set up, run the block, tear down; the block's errors pass through unchanged.

    Args:
        t: The trainer.
        stage: "fit", "validate", "test" or "predict".
        model: What to run.
        datamodule: Its data, if any.
        given: Loaders handed over directly, by "train", "val", "test" or "predict".
    """
    _attach(t, stage, model, datamodule, given)
    failed: BaseException | None = None
    # A stage that trains ends at a step when it is asked to; others leave signals to Python.
    with t.stop if stage == "fit" else nullcontext():
        try:
            _set_up(t)
            yield
        except BaseException as error:
            failed = error
        with quiet_children():
            for step in _ending(t, stage, failed):
                try:
                    step()
                except BaseException as error:
                    if failed is not None:
                        failed.add_note(f"then the tear-down failed, too: {type(error).__name__}: {error}")
                    failed = failed or error
    if failed is not None:
        faults.explain(t, failed)
        raise failed
    if stage == "fit":
        # A signal that came too late to interrupt anything.
        leave(t.stop.pending())


def _ending(t: Trainer, stage: str, failed: BaseException | None) -> Iterator[Callable[[], Any]]:
    """What is done at the end of a stage, each step whether those before it went well or not."""
    if failed is not None:
        # Before others explain why the tear-down failed, too.
        yield partial(faults.explain, t, failed)
        yield from (partial(bound, t, t.module, failed) for bound in t.overrides["on_exception"])
        if t.datamodule is not None:
            yield partial(t.datamodule.on_exception, failed)
        # Others may wait for this process in a collective: leaving tells them.
        yield distributed.destroy
    yield t.writer.wait
    if t.datamodule is not None:
        yield partial(t.datamodule.teardown, stage)
    yield from (partial(bound, t, t.module, stage) for bound in t.overrides["teardown"])
    yield partial(t.module.teardown, stage)
    yield t.loaders.close
    # Lets go of DDP, which would keep the process group alive beyond its end.
    t.strategy = Strategy(t.module.training_step)
    status = "success" if failed is None else "failed"
    yield from (partial(faults.writing_logs(t)(logger.finalize), status) for logger in t.loggers)


def _attach(t: Trainer, stage: str, model: Module, datamodule: DataModule | None, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, DataModule):
            datamodule, given = value, {**given, name: None}
    t.stage, t.module, t.datamodule = stage, model, datamodule
    t.should_stop = t.sanity_checking = False
    t.before_validation, t.resumed, t.losses = None, None, []
    t.interruption, t.stop = 0, StopRequest(t.max_seconds)
    t.metrics.clear()
    if not isinstance(model, Module):
        raise MisconfigurationException(f"the model is a {type(model).__name__}; give a subclass of engine.Module")
    model.trainer = t
    check_hook_names(model, Module, UNSUPPORTED_HOOKS)
    if not model.automatic_optimization:
        raise MisconfigurationException("automatic_optimization=False is not supported; return the loss instead")
    sources: list[Any] = [model]
    if datamodule is not None:
        datamodule.trainer = t
        check_hook_names(datamodule, DataModule)
        sources.insert(0, datamodule)
    t.loaders = Loaders(sources, given, t.limits, share=t.use_distributed_sampler)
    returned = model.configure_callbacks()
    own = [returned] if isinstance(returned, Callback) else list(returned)
    # A model's callbacks replace the trainer's of the same type.
    t.dispatch([c for c in t.callbacks if type(c) not in {type(mine) for mine in own}] + own)
    t.step_takes_batch_idx = len(inspect.signature(model.training_step).parameters) > 1
    owners = [next((s for s in sources if is_overridden(s, name, DataHooks)), model) for name in TRANSFER_HOOKS]
    t.transfer_hooks = [getattr(owner, name) for owner, name in zip(owners, TRANSFER_HOOKS, strict=True)]


def _set_up(t: Trainer) -> None:
    if t.device.type == "cuda":
        torch.cuda.set_device(t.device)
    distributed.init(t.device)
    t.state.seed = t.loaders.seed = distributed.broadcast(t.state.seed)
    folders = [logger.log_dir for logger in t.loggers if logger.log_dir]
    t.log_dir = distributed.broadcast(next(iter(folders), t.default_root_dir))
    if distributed.local_rank() == 0:
        if t.datamodule is not None:
            t.datamodule.prepare_data()
        t.module.prepare_data()
    distributed.barrier()
    if t.datamodule is not None:
        t.datamodule.setup(t.stage)
    t.call(Callback.setup, t.stage)
    t.module.setup(t.stage)
    distributed.barrier()
    t.module.configure_model()
    t.module.to(t.device)


def check_arguments(t: Trainer) -> None:
    """Refuse values out of range.

    Raises:
        MisconfigurationException: The first one found.
    """
    for name, least in LEAST.items():
        value = getattr(t, name)
        if type(value) is not int or not least <= value < 2**63:
            raise MisconfigurationException(f"{name}={value!r} makes no sense; give a whole number from {least}")
    for name, limit in t.limits.items():
        if type(limit) not in (int, float) or not 0 <= limit <= (1.0 if type(limit) is float else limit):
            raise MisconfigurationException(
                f"limit_{name}_batches={limit!r} makes no sense; give a number of batches, or a share from 0.0 to 1.0"
            )
    clip = t.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < 3e38):
        raise MisconfigurationException(f"gradient_clip_val={clip!r}; give a number from 0, or none")
    if t.gradient_clip_algorithm not in ("norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={t.gradient_clip_algorithm!r}; give norm or value")
    if t.detect_nonfinite not in ("raise", "warn", "off"):
        raise MisconfigurationException(f"detect_nonfinite={t.detect_nonfinite!r}; give raise, warn or off")

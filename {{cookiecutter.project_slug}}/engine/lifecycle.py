"""What surrounds the loops: checking arguments, attaching model and data, set-up, and tear-down come what may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed, faults
from engine.arguments import check_module
from engine.callback import Callback, check_hook_names
from engine.data import Loaders
from engine.datamodule import DataModule
from engine.evaluation import takes_batch_idx
from engine.exceptions import MisconfigurationException
from engine.hooks import DataHooks, ModelHooks, is_overridden
from engine.loggers import run_folder_of
from engine.module import Module
from engine.optim import LightningOptimizer, needs_closure, parse_optimizers
from engine.signals import StopRequest, leave, quiet_children
from engine.strategy import Strategy, make_strategy

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Methods that do something in some version of Lightning and nothing here, and what to write instead: refused at the
# start rather than ignored.
UNSUPPORTED_HOOKS = {
    "configure_optimizer": "configure_optimizers",
    "val_step": "validation_step",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
    "training_step_end": "on_train_batch_end",
    "validation_step_end": "on_validation_batch_end",
    "test_step_end": "on_test_batch_end",
}
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
    errors: list[BaseException] = []
    # A stage that trains ends at a step when it is asked to; others leave signals to Python.
    with t.stop if stage == "fit" else nullcontext(), torch.autograd.set_detect_anomaly(t.detect_anomaly):
        try:
            _set_up(t)
            yield
        except BaseException as error:
            errors.append(error)
        with quiet_children():
            for step in _ending(t, stage, errors):
                try:
                    step()
                except BaseException as error:
                    if errors:
                        errors[0].add_note(f"then the tear-down failed, too: {type(error).__name__}: {error}")
                    errors.append(error)
    if errors:
        faults.explain(t, errors[0])
        raise errors[0]
    if stage == "fit":
        # A signal that came too late to interrupt anything.
        leave(t.stop.pending())


def _ending(t: Trainer, stage: str, errors: list[BaseException]) -> Iterator[Callable[[], Any]]:
    """What is done at the end of a stage, each step whether those before it went well or not; `errors` grows."""
    running = not errors
    yield from _explaining(t, errors)
    yield t.writer.wait
    if t.datamodule is not None:
        yield partial(t.datamodule.teardown, stage)
    yield from (partial(bound, t, t.module, stage) for bound in t.overrides["teardown"])
    yield partial(t.module.teardown, stage)
    if running:
        yield from _explaining(t, errors)
    yield t.loaders.close
    # Lets go of DDP, which would keep the process group alive beyond its end.
    t.strategy = Strategy(t.module.training_step)
    status = "failed" if errors else "success"
    yield from (partial(faults.writing_logs(t)(logger.finalize), status) for logger in t.loggers)


def _explaining(t: Trainer, errors: list[BaseException]) -> Iterator[Callable[[], Any]]:
    """What is done about the first error, if there is one."""
    for error in errors[:1]:
        # Before others explain why the tear-down failed, too.
        yield partial(faults.explain, t, error)
        yield from (partial(bound, t, t.module, error) for bound in t.overrides["on_exception"])
        if t.datamodule is not None:
            yield partial(t.datamodule.on_exception, error)
        # Others may wait for this process in a collective: leaving tells them.
        yield distributed.destroy


def _attach(t: Trainer, stage: str, model: Module, datamodule: DataModule | None, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, DataModule):
            datamodule, given = value, {**given, name: None}
    t.stage, t.module, t.datamodule = stage, model, datamodule
    t.should_stop = t.sanity_checking = False
    t.before_validation, t.resumed, t.losses = None, None, []
    t.interruption, t.stop = 0, StopRequest(t.max_seconds)
    t.metrics.clear()
    t.metrics.stage = "train"
    if not isinstance(model, Module):
        raise MisconfigurationException(f"the model is a {type(model).__name__}; give a subclass of engine.Module")
    model.trainer = t
    check_hook_names(model, Module, UNSUPPORTED_HOOKS)
    sources: list[Any] = [model]
    if datamodule is not None:
        datamodule.trainer = t
        check_hook_names(datamodule, DataModule)
        sources.insert(0, datamodule)
    limits = {kind: getattr(t, f"limit_{kind}_batches") for kind in ("train", "val", "test", "predict")}
    t.loaders = Loaders(sources, given, limits, share=t.use_distributed_sampler, ordered=bool(t.overfit_batches))
    returned = model.configure_callbacks()
    own = [returned] if isinstance(returned, Callback) else list(returned)
    # A model's callbacks replace the trainer's of the same type.
    t.dispatch([c for c in t.callbacks if type(c) not in {type(mine) for mine in own}] + own)
    for callback in t.callbacks:
        callback.log, callback.log_dict = model.log, model.log_dict  # type: ignore[attr-defined]
    look_up_hooks(t)
    owners = [next((s for s in sources if is_overridden(s, name, DataHooks)), model) for name in TRANSFER_HOOKS]
    t.transfer_hooks = [getattr(owner, name) for owner, name in zip(owners, TRANSFER_HOOKS, strict=True)]
    check_module(t)


def _set_up(t: Trainer) -> None:
    if t.device.type == "cuda":
        torch.cuda.set_device(t.device)
    distributed.init(t.device)
    t.state.seed = t.loaders.seed = distributed.broadcast(t.state.seed)
    t.log_dir = distributed.broadcast(run_folder_of(t.loggers, t.default_root_dir))
    sources: list[Any] = [t.module] if t.datamodule is None else [t.datamodule, t.module]
    for source in sources:
        if (distributed.local_rank() if source.prepare_data_per_node else distributed.rank()) == 0:
            source.prepare_data()
    distributed.barrier()
    if t.datamodule is not None:
        t.datamodule.setup(t.stage)
    t.call(Callback.setup, t.stage)
    t.module.setup(t.stage)
    distributed.barrier()
    with t.precision_plugin.context if t.precision_plugin.dtype is not None else nullcontext():
        t.module.configure_model()
    t.module.to(t.device, t.precision_plugin.dtype)
    # Again, since hooks may be attributes that were set meanwhile.
    look_up_hooks(t)


def look_up_hooks(t: Trainer) -> None:
    """Find the module's steps, and those of its hooks that do something."""
    module = t.module
    t.steps = {name: getattr(module, f"{name}_step") for name in ("training", "validation", "test", "predict")}
    t.step_takes_batch_idx = takes_batch_idx(t.steps["training"])
    names = [name for name in t.overrides if hasattr(ModelHooks, name) and is_overridden(module, name, ModelHooks)]
    t.module_hooks = {name: getattr(module, name) for name in names}


def prepare_training(t: Trainer) -> None:
    """Make what trains the module: its optimizers and schedulers, and what spreads a step over processes.

    Raises:
        MisconfigurationException: They do not fit each other, or the trainer's arguments.
    """
    module = t.module
    if t.sync_batchnorm and distributed.active():
        if t.device.type != "cuda":
            raise MisconfigurationException("sync_batchnorm works on GPUs only; leave it out")
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    t.strategy = make_strategy(t.strategy_name, module, t.steps["training"], t.device)
    t.optimizers, t.lr_scheduler_configs = parse_optimizers(module.configure_optimizers(), module)
    t.lightning_optimizers = [LightningOptimizer(optimizer, t) for optimizer in t.optimizers]
    by_optimizer = needs_closure(t.optimizers[0], scaled=t.precision_plugin.scaler is not None)
    t.by_closure = by_optimizer or is_overridden(module, "optimizer_step", Module)

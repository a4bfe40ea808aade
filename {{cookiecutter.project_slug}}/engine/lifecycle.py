"""What surrounds the loops: checking arguments, attaching model and data, set-up, and tear-down come what may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine import distributed, faults, fsdp, last_words
from engine.alike import check_arguments_alike, check_parameters_alike
from engine.arguments import check_module
from engine.callback import Callback
from engine.data import Loaders
from engine.datamodule import DataModule
from engine.evaluation import takes_batch_idx
from engine.exceptions import MisconfigurationException
from engine.hook_checks import check_hooks
from engine.hooks import DataHooks, ModelHooks, is_overridden
from engine.loggers import run_folder_of
from engine.module import Module
from engine.older import steps_of, with_older_hooks
from engine.optim import LightningOptimizer, needs_closure, parse_optimizers
from engine.profilers import PassThroughProfiler, profiled
from engine.signals import StopRequest, leave, quiet_children
from engine.strategies import Strategy, make_mesh, make_strategy

if TYPE_CHECKING:
    from engine.trainer import Trainer

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
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
    # Before signals are caught: until all are there, they end a process at once.
    _join(t)
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
        # A signal that came too late to interrupt anything.
        late = t.stop.agreed(now=True) if stage == "fit" and not errors else 0
    if late or any(isinstance(error, SystemExit) for error in errors):
        last_words.outlive_the_first()
    if errors:
        faults.explain(t, errors[0])
        raise errors[0]
    leave(late)


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
    yield t.profiler.describe
    yield t.loaders.close
    t.metrics.batch = None
    # Lets go of DDP, which would keep the process group alive beyond its end.
    t.strategy = Strategy(t.module.training_step)
    status = "failed" if errors else "success"
    yield from (partial(faults.writing_logs(t)(logger.finalize), status) for logger in t.loggers)


def _explaining(t: Trainer, errors: list[BaseException]) -> Iterator[Callable[[], Any]]:
    """What is done about the first error, if there is one."""
    for error in errors[:1]:
        # Before others explain why the tear-down failed, too.
        yield partial(faults.explain, t, error)
        # And before others, which it leaves below, fail of that.
        yield partial(last_words.report, error)
        yield from (partial(bound, t, t.module, error) for bound in t.overrides["on_exception"])
        if t.datamodule is not None:
            yield partial(t.datamodule.on_exception, error)
        # Others may wait for this process in a collective: leaving tells them.
        yield partial(distributed.destroy, failed=isinstance(error, Exception))


def _attach(t: Trainer, stage: str, model: Module, datamodule: DataModule | None, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, DataModule):
            datamodule, given = value, {**given, name: None}
    if datamodule is not None and (both := [name for name, value in given.items() if value is not None]):
        raise MisconfigurationException(f"{both[0]} loaders and a data module were given; give one of the two")
    t.stage, t.module, t.datamodule = stage, model, datamodule
    t.should_stop = t.sanity_checking = False
    t.before_validation, t.resumed, t.losses = None, None, []
    t.interruption, t.stop = 0, StopRequest(t.max_seconds)
    t.metrics.clear()
    t.metrics.stage = "train"
    if not isinstance(model, Module):
        raise MisconfigurationException(f"the model is a {type(model).__name__}; give a subclass of engine.Module")
    model.trainer = t
    check_hooks(model)
    sources: list[Any] = [model]
    if datamodule is not None:
        datamodule.trainer = t
        check_hooks(datamodule)
        sources.insert(0, datamodule)
    limits = {kind: getattr(t, f"limit_{kind}_batches") for kind in ("train", "val", "test", "predict")}
    t.loaders = Loaders(sources, given, limits, share=t.use_distributed_sampler, ordered=bool(t.overfit_batches))
    returned = model.configure_callbacks()
    own = [returned] if isinstance(returned, Callback) else list(returned)
    # A model's callbacks replace the trainer's of the same type, or of a type that theirs is made of.
    others = [c for c in t.callbacks if not any(isinstance(mine, type(c)) for mine in own)]
    t.dispatch(with_older_hooks(model, others + own))
    for callback in t.callbacks:
        callback.log, callback.log_dict = model.log, model.log_dict  # type: ignore[attr-defined]
    look_up_hooks(t)
    owners = [next((s for s in sources if is_overridden(s, name, DataHooks)), None) for name in TRANSFER_HOOKS]
    t.transfer_hooks = [getattr(owner, name, None) for owner, name in zip(owners, TRANSFER_HOOKS, strict=True)]
    t.copy_stream = torch.cuda.Stream(t.device) if t.device.type == "cuda" else None  # type: ignore[no-untyped-call]
    check_module(t)


def _join(t: Trainer) -> None:
    if t.device.type == "cuda":
        torch.cuda.set_device(t.device)
    distributed.init(t.device, t.strategy_options.process_group_backend, t.strategy_options.timeout)
    # Again, since torch has put its own before it.
    last_words.watch_processes()


def _set_up(t: Trainer) -> None:
    check_arguments_alike(t)
    t.device_mesh = make_mesh(t.strategy_options, t.device)
    distributed.share_samples(1 if t.device_mesh is None else t.device_mesh["tensor_parallel"].size())
    t.state.seed = t.loaders.seed = distributed.broadcast(t.state.seed)
    t.log_dir = distributed.broadcast(run_folder_of(t.loggers, t.default_root_dir))
    _start_profiling(t)
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
    check_parameters_alike(t)
    if t.sync_batchnorm and distributed.active() and t.stage == "fit":
        _synchronise_batch_norms(t)
    if t.device_mesh is not None:
        # Sharding moves each part to the device by itself: the whole may be too large for one.
        t.module.to(dtype=t.precision_plugin.dtype)
        steps = [step for step in STEPS if is_overridden(t.module, step, Module)]
        fsdp.shard(t.module, t.device_mesh, t.precision, steps)
        fsdp.count_samples_once(t.module)
    t.module.to(t.device, t.precision_plugin.dtype)
    # Again, since hooks may be attributes that were set meanwhile.
    look_up_hooks(t)


def _synchronise_batch_norms(t: Trainer) -> None:
    if t.device.type != "cuda":
        raise MisconfigurationException("sync_batchnorm works on GPUs only; leave it out")
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(t.module)  # type: ignore[no-untyped-call]


def look_up_hooks(t: Trainer) -> None:
    """Find the module's steps, and those of its hooks that do something."""
    module, name = t.module, f"[LightningModule]{type(t.module).__name__}"
    t.steps = {f"{stage}_step": step for stage, step in steps_of(module).items()}
    t.takes_batch_idx = {name: takes_batch_idx(step) for name, step in t.steps.items() if step is not None}
    t.steps |= {"backward": module.backward, "optimizer_step": t.precision_plugin.step}
    own = [hook for hook in t.overrides if hasattr(ModelHooks, hook) and is_overridden(module, hook, ModelHooks)]
    t.module_hooks = {hook: getattr(module, hook) for hook in own}
    # The default of these is one call, which a step makes itself.
    profiling = type(t.profiler) is not PassThroughProfiler
    for method in ("backward", "optimizer_zero_grad", "configure_gradient_clipping", "clip_gradients"):
        if is_overridden(module, method, Module) or (profiling and method in ("backward", "optimizer_zero_grad")):
            t.module_hooks[method] = getattr(module, method)
    if profiling or t.precision_plugin.scaler is not None:
        t.module_hooks["optimizer_step"] = t.steps["optimizer_step"]
    for table in (t.steps, t.module_hooks):
        table.update({hook: profiled(t.profiler, f"{name}.{hook}", work) for hook, work in table.items()})
    t.hooked = find_hooked(t)


def find_hooked(t: Trainer) -> set[str]:
    """Names of the hooks that a callback or the module overrides: the others need not be called."""
    return {*t.module_hooks, *(hook for hook, bounds in t.overrides.items() if bounds)}


def _start_profiling(t: Trainer) -> None:
    """Have all that happens from here recorded, as actions by name."""
    t.profiler._lightning_module = t.module
    t.profiler.setup(t.stage, distributed.rank() if distributed.active() else None, t.log_dir)
    for table in (t.overrides, t.late):
        for hook, bounds in table.items():
            owners = [getattr(bound, "__self__", t.module) for bound in bounds]
            actions = [f"[Callback]{getattr(owner, 'state_key', 'older')}.{hook}" for owner in owners]
            table[hook] = tuple(profiled(t.profiler, a, bound) for a, bound in zip(actions, bounds, strict=True))
    if type(t.profiler) is not PassThroughProfiler:
        own = zip(TRANSFER_HOOKS, t.transfer_hooks, strict=True)
        hooks = {f"[LightningModule].{name}": hook or getattr(t.module, name) for name, hook in own}
        t.transfer_hooks = [profiled(t.profiler, action, hook) for action, hook in hooks.items()]


def prepare_training(t: Trainer) -> None:
    """Make what trains the module: its optimizers and schedulers, and what spreads a step over processes.

    Raises:
        MisconfigurationException: They do not fit each other, or the trainer's arguments.
    """
    module = t.module
    t.strategy = make_strategy(t.strategy_options, module, t.steps["training_step"], t.device)
    t.optimizers, t.lr_scheduler_configs = parse_optimizers(module.configure_optimizers(), module)
    t.lightning_optimizers = [LightningOptimizer(optimizer, t) for optimizer in t.optimizers]
    by_optimizer = needs_closure(t.optimizers[0], scaled=t.precision_plugin.scaler is not None)
    t.by_closure = by_optimizer or is_overridden(module, "optimizer_step", Module)

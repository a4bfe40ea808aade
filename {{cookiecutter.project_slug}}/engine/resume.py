"""What a trainer saves, and how it takes it back: after `restore`, a run goes on as if it had never stopped.

A checkpoint holds the state before the next training batch. `moment` is the part of it that validation changes; it is
taken before a validation within fit, so that what is saved meanwhile, or when a validation is broken off, is the
state before it.
"""

from __future__ import annotations

import platform
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from engine import distributed, elastic
from engine.callback import Callback
from engine.checkpoint import FORMAT, Checkpoint, fitting, load_weights, plain
from engine.exceptions import DamagedCheckpoint, MisconfigurationException
from engine.faults import check_losses, writing_logs
from engine.fsdp import as_like
from engine.hooks import is_overridden, move_to_device
from engine.hparams import plain_hparams
from engine.kinds import is_collection, is_metric
from engine.reading import own_sampler
from engine.seed import capture_rng

if TYPE_CHECKING:
    from engine.trainer import Trainer

RESUMABLE = {"optimizer_states": list, "lr_schedulers": list, "precision": dict, "callbacks": dict}
RESUMABLE |= {"datamodule": dict, "state": dict, "order": dict, "evaluation_steps": list, "loggers": list}
OF_EACH_PROCESS = ("meters", "metrics", "rng", "loaders", "gradients")
RESUMABLE |= dict.fromkeys(OF_EACH_PROCESS, list)
CPU = torch.device("cpu")
# The release whose names and meaning the shared keys have.
LIGHTNING = "2.6.6"


def capture(t: Trainer, weights_only: bool = False) -> Checkpoint:
    """Everything a trainer has to save, as in the schema of `engine.checkpoint`; every process must call this.

    Raises:
        FloatingPointError: A loss of the steps before was NaN or infinite.
    """
    if t.stage == "fit":
        check_losses(t)
    module, datamodule, state = t.module, t.datamodule, t.state
    hparams = {"": module, "datamodule_": datamodule}
    plain = {prefix: {} if owner is None else plain_hparams(owner.hparams) for prefix, owner in hparams.items()}
    captured: Checkpoint = {
        "format": FORMAT,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": module.state_dict(),
        "hyper_parameters": plain[""],
        "hparams_name": module._hparams_name,
        "datamodule_hyper_parameters": plain["datamodule_"],
        "datamodule_hparams_name": datamodule._hparams_name if datamodule is not None else None,
        "pytorch-lightning_version": LIGHTNING,
        "env": {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "world_size": distributed.world_size(),
        },
    }
    for prefix, owner in hparams.items():
        if owner is not None and (left_out := sorted(owner.hparams.keys() - plain[prefix].keys())):
            captured[f"{prefix}hparams_left_out"] = left_out
    if not weights_only:
        before = t.before_validation or moment(t)
        kept, keys = before["callbacks"], {callback.state_key: callback for callback in t.callbacks}
        captured |= before | {
            "callbacks": {key: kept[key] if key in kept else c.state_dict() for key, c in keys.items()},
            "optimizer_states": [optimizer.state_dict() for optimizer in t.optimizers],
            "lr_schedulers": [config.scheduler.state_dict() for config in t.lr_scheduler_configs],
            "precision": t.precision_plugin.state_dict(),
        }
        own = {**before, "gradients": _gradients(t)}
        captured |= {name: _of_all(t, name, own[name]) for name in OF_EACH_PROCESS}
    own_keys = set(captured)
    for callback in t.callbacks:
        if not weights_only or getattr(callback, "averages_weights", False):
            callback.on_save_checkpoint(t, module, captured)
    if weights_only:
        # An average takes the place of the weights, which are not kept beside it.
        captured = {key: captured[key] for key in own_keys}
    module.on_save_checkpoint(captured)
    return captured


def _of_all(t: Trainer, name: str, own: Any) -> list[Any]:
    """What each process with samples of its own has."""
    # Gradients of parameters that are spread over processes are spread, too.
    spread = name == "gradients" and t.device_mesh is not None
    if spread:
        return [own]
    # Not without need: to move something is to look at all its parts, and a loader's state may have many.
    here = own if t.device == CPU else move_to_device(own, CPU)
    return distributed.one_of_each_group(distributed.all_gather(here))


def moment(t: Trainer, apart: bool = False) -> Checkpoint:
    """The part of a checkpoint that logging and evaluation change; of this process.

    Args:
        t: The trainer.
        apart: Copy what goes on changing.
    """
    hooks = [name for name in t.overrides if "validation" in name]
    validating = [c for c in t.callbacks if any(is_overridden(c, name, Callback) for name in hooks)]
    parts = dict(t.module.named_modules())
    state = t.state
    batches_done, samples_done = (0, 0) if state.epoch_over else (state.batches_done, state.samples_done)
    with writing_logs(t):
        # So that the logs of a killed run are never behind its checkpoint.
        for logger in t.loggers:
            logger.save()
    position = {"epoch": state.epoch + state.epoch_over, "epoch_over": False}
    position |= {"batches_done": batches_done, "samples_done": samples_done}
    training = t.stage == "fit"
    changing = {
        "callbacks": {c.state_key: plain(c.state_dict(), "callbacks") for c in t.callbacks if c in validating},
        "datamodule": plain(t.datamodule.state_dict(), "datamodule") if t.datamodule is not None else {},
        "metrics": _metric_states(parts),
        "loggers": [logger.state_dict() if hasattr(logger, "state_dict") else None for logger in t.loggers],
        "loaders": t.loaders.train().state_dict(batches_done) if training else None,
    }
    return (deepcopy(changing) if apart else changing) | {
        "state": asdict(state) | position | {"should_stop": t.should_stop},
        "order": _order(t) if training else {},
        "meters": t.metrics.state_dict({id(part): name for name, part in parts.items()}),
        "evaluation_steps": [[*which, steps] for which, steps in t.evaluation_steps.items()],
        "rng": capture_rng(),
    }


def restore_weights(t: Trainer, found: tuple[Path, Checkpoint] | None) -> None:
    """Load the weights of the trainer's module, and what data module and callbacks keep.

    Args:
        t: The trainer.
        found: A file and what is in it; None does nothing.

    Raises:
        MisconfigurationException: It does not fit.
    """
    if found is None:
        return
    path, loaded = found
    if t.stage == "fit":
        check_resumable(path, loaded)
    with fitting(path, "content"):
        t.module.on_load_checkpoint(loaded)
    load_weights(t.module, loaded["state_dict"], path, strict=t.module.strict_loading)
    if t.datamodule is not None and "datamodule" in loaded:
        with fitting(path, "datamodule"):
            t.datamodule.load_state_dict(loaded["datamodule"])
    for callback in t.callbacks:
        with fitting(path, f"callbacks[{callback.state_key!r}]"):
            callback.on_load_checkpoint(t, t.module, loaded)
            if saved := loaded.get("callbacks", {}).get(callback.state_key):
                callback.load_state_dict(saved)
    strange = {key for key, state in loaded.get("callbacks", {}).items() if state} - {c.state_key for c in t.callbacks}
    if strange and t.stage == "fit":
        distributed.rank_zero_warn(
            f"{path} has states of callbacks that this run lacks: {', '.join(sorted(map(str, strange)))}"
        )
    if t.stage == "fit" and "current_model_state" in loaded:
        raise MisconfigurationException(
            f"checkpoint {path} holds averages of the weights; resume with EMAWeightAveraging (--ema_decay), too"
        )


def restore_training(t: Trainer, path: Path, loaded: Checkpoint) -> None:
    """Put optimizers, schedulers, the loss scale and the position back."""
    pairs: list[tuple[str, list[Any]]] = [
        ("optimizer_states", t.optimizers),
        ("lr_schedulers", [c.scheduler for c in t.lr_scheduler_configs]),
    ]
    for key, targets in pairs:
        if len(loaded[key]) != len(targets):
            raise MisconfigurationException(
                f"checkpoint {path} has {len(loaded[key])} {key}, this run has {len(targets)}; resume with the same "
                "configure_optimizers"
            )
        for target, saved in zip(targets, loaded[key], strict=True):
            with fitting(path, key):
                if type(target).__module__ == "torch.optim.lr_scheduler":
                    _check_kind(saved, target.state_dict())
                target.load_state_dict(_spread(saved, target) if key == "optimizer_states" else saved)
    with fitting(path, "precision"):
        t.precision_plugin.load_state_dict(loaded["precision"])
    _restore_position(t, path, loaded)


def _spread(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, spread over processes as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = {
        number: {name: as_like(value, parameter) for name, value in saved["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in saved["state"]
    }
    return {**saved, "state": {**saved["state"], **state}}


def _restore_position(t: Trainer, path: Path, loaded: Checkpoint) -> None:
    with fitting(path, "state"):
        saved = dict(loaded["state"])
        t.should_stop = bool(saved.pop("should_stop"))
        t.state = type(t.state)(**saved)
        if t.should_stop:
            distributed.rank_zero_warn(f"{path} is of a run that had stopped by itself (early), so that it is over")
        _check_kind(asdict(t.state), asdict(type(t.state)(seed=0)))
        if not all(0 <= number < 2**63 for number in asdict(t.state).values()):
            raise ValueError(f"{saved}")
    # Before the loader is given its state: later, a new one would have none.
    t.reload_dataloaders()
    with fitting(path, "order"):
        elastic.renumber(t, path, loaded, _order(t))


def _check_kind(saved: Any, own: Any) -> None:
    """Refuse a state that is not built like the one that it replaces; what is None there may be anything.

    Raises:
        TypeError: It is not.
    """
    if own is None:
        return
    if isinstance(own, dict):
        by_number = isinstance(saved, dict) and all(
            type(n) is int for item in (*saved.items(), *own.items()) for n in item
        )
        if not by_number and (not isinstance(saved, dict) or own.keys() != saved.keys()):
            raise TypeError(f"{list(own)} expected")
        pairs = [] if by_number else [(saved[key], own[key]) for key in own]
    elif isinstance(own, list | tuple):
        if type(saved) is not type(own) or len(saved) != len(own):
            raise TypeError(f"{len(own)} values expected")
        pairs = list(zip(saved, own, strict=True))
    else:
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (saved, own))
        if not numbers and type(saved) is not type(own):
            raise TypeError(f"{saved!r:.50} in place of {own!r:.50}")
        pairs = []
    for one, other in pairs:
        _check_kind(one, other)


def _restore_metric(metric: Any, saved: dict[str, Any]) -> None:
    if is_metric(metric):
        if type(saved["updates"]) is not int or saved["values"].keys() != metric._defaults.keys():
            raise TypeError(f"{sorted(metric._defaults)} expected")
        for name, value in saved["values"].items():
            dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
            if not (isinstance(value, list) if isinstance(metric._defaults[name], list) else dense):
                raise TypeError(f"{name} is a {type(value).__name__}")
        # Copies: metrics of one group share tensors, and tensors that are shared in the file still are.
        for key, value in move_to_device(deepcopy(saved["values"]), metric.device).items():
            setattr(metric, key, value)
        metric._update_count, metric._computed = saved["updates"], None


def restore_running(t: Trainer, path: Path, loaded: Checkpoint) -> None:
    """Put back running values, logs, gradients, the train loader's own state, and all random numbers.

    Last of all, since the sanity check forgets values, and hooks may draw random numbers.
    """
    rank = distributed.data_rank()
    parts = dict(t.module.named_modules())
    with fitting(path, "meters"):
        t.metrics.load_state_dict(elastic.meters(loaded["meters"]), parts)
        for stage, loader, steps in loaded["evaluation_steps"]:
            if type(steps) is not int:
                raise TypeError("evaluation_steps are whole numbers")
            t.evaluation_steps[stage, loader] = steps
    with fitting(path, "metrics"):
        metrics = elastic.metrics(loaded["metrics"], parts, path)
        for name in metrics.keys() & parts.keys():
            _restore_metric(parts[name], metrics[name])
    try:
        for logger, saved in zip(t.loggers, loaded["loggers"], strict=False):
            if saved is not None and hasattr(logger, "load_state_dict"):
                logger.load_state_dict(saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"the logs in {t.log_dir} cannot be continued ({type(error).__name__}: {error}); move them away"
        ) from error
    with fitting(path, "gradients"):
        parameters = dict(t.module.named_parameters())
        for name, gradient in elastic.gradients(t, loaded["gradients"]).items():
            own = parameters[name]
            own.grad = as_like(gradient.to(own), own)
            if own.grad.layout is torch.strided and own.grad.stride() != own.stride():
                # Saved with another memory format, which fused optimizers would not notice.
                own.grad = torch.empty_like(own).copy_(own.grad)
    with fitting(path, "loaders"):
        if rank < len(loaded["loaders"]):
            t.loaders.train().load_state_dict(loaded["loaders"][rank])
    with fitting(path, "rng"):
        elastic.restore_random(t, loaded["rng"])


def check_resumable(path: Path, loaded: Checkpoint) -> None:
    """Refuse a checkpoint that holds weights only.

    Raises:
        MisconfigurationException: Something that training needs is missing.
    """
    missing = [key for key in RESUMABLE if not isinstance(loaded.get(key), RESUMABLE[key])]
    if missing:
        raise DamagedCheckpoint(
            f"checkpoint {path} holds weights only; it can be tested, not resumed (no {', '.join(missing)})"
        )


def _gradients(t: Trainer) -> dict[str, torch.Tensor]:
    within = t.state.batches_done % t.accumulate_grad_batches and not t.is_last_batch
    # A module that optimises by itself may accumulate gradients as it likes.
    if t.module.automatic_optimization and (not within or t.state.epoch_over):
        return {}
    return {name: p.grad for name, p in t.module.named_parameters() if p.grad is not None}


def _order(t: Trainer) -> dict[str, Any]:
    """What decides which samples an epoch's batches and steps have."""
    loader = t.loaders.train().loader
    sampler = own_sampler(loader)
    order = dict[str, Any](accumulate_grad_batches=t.accumulate_grad_batches, processes=distributed.data_world_size())
    order["batch_size"] = getattr(loader, "batch_size", None)
    if sampler is not None:
        order |= {"samples": sampler.size, "shuffle": sampler.shuffle}
    return order


def _metric_states(parts: dict[str, Any]) -> dict[str, Any]:
    for part in parts.values():
        if is_collection(part):
            # Members of a compute group share states that only the first of them keeps up to date.
            list(part.items(copy_state=False))
    updated = {n: m for n, m in parts.items() if is_metric(m) and m._update_count}
    return {name: {"values": dict(m.metric_state), "updates": m._update_count} for name, m in updated.items()}

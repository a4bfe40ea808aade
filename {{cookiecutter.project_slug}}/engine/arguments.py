"""The Trainer's arguments: which values make sense, alone and together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.exceptions import MisconfigurationException
from engine.hooks import is_overridden
from engine.module import Module

if TYPE_CHECKING:
    from engine.trainer import Trainer

# Smallest value of each whole-number argument.
LEAST = {"max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "fast_dev_run": 0}
LEAST |= {"num_sanity_val_steps": -1, "reload_dataloaders_every_n_epochs": 0}
LEAST |= {"log_every_n_steps": 0, "accumulate_grad_batches": 1}
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def check_arguments(t: Trainer) -> None:
    """Refuse values out of range, and those that contradict each other.

    Raises:
        MisconfigurationException: The first one found.
    """
    for name, least in LEAST.items():
        _check_number(name, getattr(t, name), least)
    if t.check_val_every_n_epoch is not None:
        _check_number("check_val_every_n_epoch", t.check_val_every_n_epoch, 1)
    for name in LIMITS:
        limit = getattr(t, name)
        if type(limit) not in (int, float) or not 0 <= limit <= (1.0 if type(limit) is float else limit):
            raise MisconfigurationException(
                f"{name}={limit!r} makes no sense; give a number of batches, or a share from 0.0 to 1.0"
            )
    clip = t.gradient_clip_val
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < 3e38):
        raise MisconfigurationException(f"gradient_clip_val={clip!r}; give a number from 0, or none")
    if t.gradient_clip_algorithm not in (None, "norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={t.gradient_clip_algorithm!r}; give norm or value")
    if t.detect_nonfinite not in ("raise", "warn", "off"):
        raise MisconfigurationException(f"detect_nonfinite={t.detect_nonfinite!r}; give raise, warn or off")
    _check_validation(t)


def _check_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:
        raise MisconfigurationException(f"{name}={value!r} makes no sense; give a whole number from {least}")


def _check_validation(t: Trainer) -> None:
    interval = t.val_check_interval
    if t.val_check_time is not None:
        return
    if type(interval) is int:
        _check_number("val_check_interval", interval, 1)
    elif type(interval) is not float or not 0 < interval <= 1:
        raise MisconfigurationException(
            f"val_check_interval={interval!r}; give a number of training batches, a share of an epoch above 0.0 up to "
            "1.0, or a time such as 00:00:15:00"
        )
    elif t.check_val_every_n_epoch is None and interval != 1:
        raise MisconfigurationException(
            f"check_val_every_n_epoch=None counts batches across epochs: val_check_interval={interval} has to be a "
            "whole number of them, or a time"
        )


def check_barebones(**wanted: Any) -> None:
    """Refuse what barebones turns off.

    Raises:
        MisconfigurationException: Something was asked for by name.
    """
    asked = [name for name, value in wanted.items() if value]
    if asked:
        raise MisconfigurationException(
            f"barebones=True turns off what costs time, but {', '.join(asked)} asks for it; leave out one of the two"
        )


def check_module(t: Trainer) -> None:
    """Refuse a module without what its stage needs, and what cannot be done for one that optimises by itself.

    Raises:
        MisconfigurationException: Something is missing, or the trainer was asked for what the module does itself.
    """
    module, name = t.module, type(t.module).__name__
    step = {"fit": "training_step", "validate": "validation_step", "test": "test_step"}.get(t.stage)
    needed = [step] if step else []
    needed += ["configure_optimizers"] if t.stage == "fit" else []
    for hook in needed:
        if not is_overridden(module, hook, Module):
            raise MisconfigurationException(f"{name} has no {hook}; write one to call {t.stage}")
    if t.stage != "fit" or module.automatic_optimization:
        return
    if t.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={t.gradient_clip_val} with automatic_optimization=False; call self.clip_gradients "
            "before optimizer.step() in training_step instead"
        )
    if t.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={t.accumulate_grad_batches} with automatic_optimization=False; call "
            "optimizer.step() every so many batches in training_step instead"
        )

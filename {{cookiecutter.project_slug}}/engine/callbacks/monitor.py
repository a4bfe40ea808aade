"""How callbacks read the value that they watch, and when they look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torch import Tensor

    from engine.trainer import Trainer


def check_mode(mode: str) -> None:
    """Refuse a mode that is neither min nor max."""
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"mode={mode!r}; give 'min' where less is better, 'max' where more is")


def monitored_value(trainer: Trainer, name: str, who: str, fresh: bool, wait: bool = False) -> Tensor | None:
    """The value logged under `name`, on the CPU.

    Args:
        trainer: The trainer.
        name: Name of the value.
        who: Who asks, for the message.
        fresh: Whether it must be of this epoch.
        wait: Whether it may come later.

    Returns:
        None where it has not been computed, because validation was not due.

    Raises:
        MisconfigurationException: Nothing of that name was ever logged, though validation has run.
    """
    metrics = trainer.callback_metrics
    if name in (trainer.metrics.fresh if fresh else metrics):
        return metrics[name].detach().cpu()
    if name in metrics or wait or (trainer.validates and not trainer.metrics.validated):
        return None
    raise MisconfigurationException(
        f"{who} watches {name!r}, which was never logged; logged are: {', '.join(sorted(metrics)) or 'none'}"
    )


def looks_at_epoch_end(trainer: Trainer, chosen: bool | None) -> bool:
    """Whether values are looked at when an epoch ends: as was chosen, or where every epoch ends with a validation."""
    once = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return (once or not trainer.validates) if chosen is None else chosen


def validated_in_fit(trainer: Trainer) -> bool:
    """Whether the validation that ends is one of fit, and has come to its end."""
    return trainer.stage == "fit" and not trainer.sanity_checking and trainer.before_validation is None

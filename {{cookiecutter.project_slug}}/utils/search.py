"""`python main.py --find_lr` and `--find_batch_size`: a line to go on with, and a picture of how it was found."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import engine
from utils.arguments import constructor_arguments
from utils.find_batch_size import find_batch_size
from utils.find_lr import find_lr
from utils.run_folder import logger_arguments

# Searches stop by themselves; schedules want to know a number of steps.
ENDLESS = 10**9


def search(model: Any, data: Any, arguments: Any) -> dict[str, float]:
    """Find a learning rate or a batch size, and say which.

    Args:
        model: The MInterface.
        data: The DInterface.
        arguments: Those of the command line.

    Returns:
        What was found: lr, or batch_size.

    Raises:
        MisconfigurationException: It cannot be searched so, or nothing was found.
        OSError: The picture cannot be written.
    """
    flag = "find_lr" if arguments.find_lr else "find_batch_size"
    _check(f"--{flag}", arguments)
    where = logger_arguments(arguments)
    picture = Path(where["save_dir"], where["name"], f"{flag}.png")
    settings = constructor_arguments(engine.Trainer, arguments) | _only_training(arguments)
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.MisconfigurationException(
            f"the folder {picture.parent} cannot be made ({error.strerror}); choose another --log_dir"
        ) from error
    try:
        if arguments.find_lr:
            return find_lr(model, data, arguments.lr, settings, picture)
        return find_batch_size(model, data, settings, picture)
    finally:
        with suppress(OSError):
            # If nothing is in it.
            picture.parent.rmdir()


def _check(flag: str, arguments: Any) -> None:
    """Refuse what a search would not heed."""
    if arguments.find_lr and arguments.find_batch_size:
        raise engine.MisconfigurationException(
            "--find_lr and --find_batch_size: give one of them; first --find_batch_size, then --find_lr with the "
            "--batch_size that it found"
        )
    if arguments.ckpt_path is not None:
        raise engine.MisconfigurationException(
            f"{flag} is for training from the start: leave out --ckpt_path (to begin with the weights of a checkpoint: "
            "--pretrained)"
        )
    if arguments.fast_dev_run:
        raise engine.MisconfigurationException(f"{flag} and --fast_dev_run: give one of them")


def _only_training(arguments: Any) -> dict[str, Any]:
    """Arguments of a Trainer that trains until it is stopped, and does nothing beside it."""
    settings: dict[str, Any] = {"max_epochs": -1, "max_steps": ENDLESS, "min_epochs": None, "min_steps": None}
    settings |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "val_check_interval": None}
    settings |= {"max_time": None, "check_val_every_n_epoch": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    # A search goes where losses are no numbers any more. Lightning, by the name of engine, does not look for these.
    return settings | ({"detect_nonfinite": "off"} if "detect_nonfinite" in arguments else {})

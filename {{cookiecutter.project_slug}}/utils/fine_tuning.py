"""Training on from weights that exist already, and keeping parts of a net as they are."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import MisconfigurationException

try:
    from engine.untrusted import check_records
except ImportError:
    # Another trainer goes by the name of engine: what torch checks by itself is left.
    check_records = None  # type: ignore[assignment]

ALL_BUT = "all_but"


def load_pretrained(net: Any, source: str) -> list[str]:
    """Copy weights into a net, in place; those that do not fit, such as a layer for other classes, stay as they are.

    Args:
        net: The net.
        source: A checkpoint of a run, or a file with a state dict; for a net with a method `pretrained_weights`
            also a name that this method knows.

    Returns:
        Names of the net's weights that stay as they are.

    Raises:
        MisconfigurationException: There is no such file or name, or less than half of the parameters fit.
    """
    if os.path.isfile(source):
        weights = _read(source)
    elif hasattr(net, "pretrained_weights"):
        try:
            weights = net.pretrained_weights(source)
        except ValueError as error:
            raise MisconfigurationException(f"--pretrained {source}: {error}") from error
    else:
        raise MisconfigurationException(f"--pretrained {source}: there is no such file")
    own = net.state_dict()
    if not own.keys() & weights.keys():
        # Weights of torchvision, for a net that holds torchvision's.
        weights = {f"net.{name}": value for name, value in weights.items()}
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    needed = [name for name, _ in net.named_parameters()]
    if 2 * len(fitting.keys() & set(needed)) < len(needed):
        raise MisconfigurationException(
            f"--pretrained {source}: of this net's {len(needed)} parameters only {len(fitting.keys() & set(needed))} "
            "have the name and shape of one in it; it belongs to another net, or to one of another width"
        )
    net.load_state_dict(fitting, strict=False)
    new = [name for name in own if name not in fitting]
    if os.environ.get("RANK", "0") == "0":
        first = f"; new are {', '.join(new[:4])}{', ...' if len(new) > 4 else ''}" if new else ""
        print(f"pretrained: {len(fitting)} of the net's {len(own)} weights come from {source}{first}")
    return new


def freeze(net: nn.Module, parts: list[str]) -> list[nn.Module]:
    """Exclude parts of a net from training.

    Args:
        net: The net.
        parts: Prefixes of parameter names, such as "features" or "layer1.0"; after a first "all_but" those to train.

    Returns:
        The submodules that are frozen as a whole, to be kept in evaluation mode: so their batch norms rest, too.

    Raises:
        MisconfigurationException: A part does not exist, or nothing is left to train.
    """
    inverted = parts[:1] == [ALL_BUT]
    prefixes = parts[1:] if inverted else parts
    names = [name for name, _ in net.named_parameters()]
    for prefix in prefixes:
        if not any(within(name, prefix) for name in names):
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise MisconfigurationException(f"--freeze {prefix}: the net has no part of that name; it has {tops}")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(within(name, prefix) for prefix in prefixes) == inverted)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise MisconfigurationException(f"--freeze {' '.join(parts)}: nothing is left to train")
    resting = []
    for name, part in net.named_modules():
        chosen = any(within(name, prefix) for prefix in prefixes) != inverted
        # A batch norm without parameters learns, too: it rests if it lies in what is frozen.
        if chosen if not list(part.parameters()) else not any(p.requires_grad for p in part.parameters()):
            resting.append(part)
    return resting


def within(name: str, prefix: str) -> bool:
    """Whether a parameter is the one of that name, or lies in the part of that name."""
    return name == prefix or name.startswith(f"{prefix}.")


def _read(path: str) -> dict[str, Tensor]:
    """The weights in a file, under the names that the net itself has for them."""
    try:
        if check_records is not None:
            check_records(Path(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"--pretrained {path} holds Python objects, which could run code when loaded, and was refused"
        ) from error
    except Exception as error:  # a file that is no checkpoint can fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MisconfigurationException(f"--pretrained {path} cannot be read as weights: {reason}") from error
    if isinstance(content, dict) and "shards" in content:
        # Its tensors lie beside it, in parts.
        content = importlib.import_module("engine.checkpoint").load(Path(path))
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MisconfigurationException(f"--pretrained {path} holds no weights; give a checkpoint or a state dict")
    return content

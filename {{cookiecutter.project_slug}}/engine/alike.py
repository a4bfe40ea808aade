"""Whether all processes run the same thing: otherwise they would wait for each other, or mix up their gradients."""

from __future__ import annotations

import zlib
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from engine import distributed
from engine.checkpoint import plain
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from engine.trainer import Trainer

# What each process, or each machine, may have of its own. The seed of the first process counts for all.
OWN = {"accelerator", "devices", "device", "logger", "callbacks", "profiler", "seed", "num_workers", "pin_memory"}
OWN |= {"enable_progress_bar", "enable_model_summary", "rank", "local_rank", "global_rank", "node_rank"}
PLACES = ("dir", "path", "root", "folder", "file")
# Characters of a value, and how many names, that a message has.
LONGEST, MOST = 60, 3


def check_arguments_alike(t: Trainer) -> None:
    """Refuse other arguments, of trainer, module or data module, than another process has.

    Raises:
        MisconfigurationException: Some differ; every process raises it, with their values by rank.
    """
    owners = {"Trainer": t.arguments, type(t.module).__name__: t.module.hparams}
    if t.datamodule is not None:
        owners[type(t.datamodule).__name__] = t.datamodule.hparams
    told = {"the stage": t.stage}
    for owner, values in owners.items():
        # The places of what two of them have differ on purpose, or in both.
        told |= {f"{n} ({owner})": _text(v) for n, v in values.items() if n not in OWN and not n.endswith(PLACES)}
    _check(told, "start all of them with the same arguments, or leave a hyper-parameter out: save_hyperparameters")


def check_parameters_alike(t: Trainer) -> None:
    """Refuse other parameters than another process has, or others that are trained.

    Raises:
        MisconfigurationException: Some differ; every process raises it.
    """
    told = {
        f"parameter {name}": "not known yet"
        if is_lazy(parameter)
        else f"{'trained' if parameter.requires_grad else 'frozen'}, shape {tuple(parameter.shape)}"
        for name, parameter in t.module.named_parameters()
    }
    _check(told, "build the same module in all of them, whatever their rank")


def _check(told: dict[str, str], advice: str) -> None:
    if not distributed.active() or len(set(distributed.all_gather(zlib.crc32(repr(told).encode())))) == 1:
        return
    everybody = distributed.all_gather(told)
    names = [name for name in dict.fromkeys(name for one in everybody for name in one)]
    differing = {
        name: values for name in names if len(set(values := [one.get(name, "missing") for one in everybody])) > 1
    }
    shown = [f"{name} is {_by_rank(values)}" for name, values in [*differing.items()][:MOST]]
    more = f"; and {len(differing) - MOST} more" if len(differing) > MOST else ""
    raise MisconfigurationException(
        f"processes of this run differ: {'; '.join(shown) or 'the order of parameters'}{more}; {advice}"
    )


def _text(value: Any) -> str:
    """A plain value as text that is the same in all processes; of others only the type counts."""
    try:
        value = plain(repr(value) if is_dataclass(value) else value, "")
    except MisconfigurationException:
        return f"a {type(value).__name__}"
    text = repr(sorted(value, key=repr) if isinstance(value, set) else value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({zlib.crc32(text.encode()):08x})"


def _by_rank(values: list[str]) -> str:
    """As "2 on rank 0, 3 on rank 1, 2, 3 and 60 more"."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{value} on rank {', '.join(map(str, held[:4]))}{f' and {len(held) - 4} more' if len(held) > 4 else ''}"
        for value, held in ranks.items()
    )

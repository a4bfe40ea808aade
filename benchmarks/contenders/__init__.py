"""Those who race: the loop written by hand, this Trainer, and the peers, each as its documentation has it.

A file has `train`, which does steps on batches that lie in memory, and `epochs`, which trains and validates.
"""

from __future__ import annotations

from typing import NamedTuple


class Contender(NamedTuple):
    """Someone who races.

    Attributes:
        name: As the tables have it.
        module: Its file, as it is imported.
        imported: What its users import.
        environment: Its environment below `build/peers/`; None for `.venv`.
        variant: Which way of a library, where it has several.
        modes: In which modes it races.
    """

    name: str
    module: str
    imported: str
    environment: str | None = None
    variant: str = ""
    modes: tuple[str, ...] = ("quiet", "realistic")


BARE, OURS = "bare loop", "this Trainer"
CONTENDERS = (
    Contender(BARE, "contenders.bare", "torch"),
    Contender(OURS, "contenders.ours", "engine"),
    Contender("Fabric", "contenders.fabric", "lightning.fabric", "lightning"),
    Contender("Accelerate", "contenders.accelerating", "accelerate", "accelerate"),
    Contender("Ignite", "contenders.igniting", "ignite.engine, ignite.handlers, ignite.metrics", "ignite"),
    Contender("Lightning barebones", "contenders.lightning_trainer", "lightning", "lightning", "barebones", ("quiet",)),
    Contender("Lightning", "contenders.lightning_trainer", "lightning", "lightning"),
    Contender("Hugging Face Trainer", "contenders.huggingface", "transformers.Trainer", "huggingface"),
)
PEERS = {contender.name for contender in CONTENDERS if contender.environment is not None}
# Races only where an epoch is measured: what DInterface and MInterface do beside it is no Trainer's overhead.
GENERATED = Contender("generated project", "contenders.ours", "engine", variant="generated project")
# Races there, too: this Trainer with a sampler of the user's own.
OWN_SAMPLER = Contender(f"{OURS}, with a sampler of one's own", "contenders.ours", "engine", variant="own sampler")

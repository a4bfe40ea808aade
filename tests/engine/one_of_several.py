"""What the tests of several processes start under a real torchrun, or by hand: `one_of_several.py WHAT PATH...`."""

from __future__ import annotations

# ruff: noqa: E402
import sys
from datetime import timedelta

sys.path[:0] = sys.argv[2:4]

import torch
from engine import distributed, rendezvous
from test_failures_of_one import train

if sys.argv[1] in ("join", "join soon"):
    rendezvous.JOIN_SECONDS = 300.0 if sys.argv[1] == "join" else 4.0
    distributed.init(torch.device("cpu"), timeout=timedelta(seconds=20))
    distributed.barrier()
else:
    train(sys.argv[1])

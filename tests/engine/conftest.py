"""Makes `toy` importable, and keeps tests from touching each other's seeds, environment and working folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, a fixed seed, and the environment as it was."""
    import engine

    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    engine.seed_everything(1)
    yield
    os.environ.clear()
    os.environ.update(before)

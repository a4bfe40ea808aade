"""Makes the parts of this folder importable, and gives every test an empty working folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, and the environment as it was."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=[False, True], ids=["short", "closures"])
def same(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`harness.same`, without and with the hooks recorded that take our engine off its short path."""
    from harness import same

    return partial(same, closures=request.param)

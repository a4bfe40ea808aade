"""The list of deviations has none that is there for nothing."""

from __future__ import annotations

from pathlib import Path

import deviations


def test_every_deviation_is_expected_by_a_scenario() -> None:
    # Whoever expects one fails unless it occurs.
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    names = [name for name, value in vars(deviations).items() if isinstance(value, deviations.Deviation)]
    assert names and not [name for name in names if f"deviations.{name}" not in tests]

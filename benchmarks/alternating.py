"""Two loops that take turns within one process: the Trainer, and one by hand whenever a block of the Trainer begins."""

from __future__ import annotations

import time
from collections.abc import Callable


class Alternation:
    """Runs a block by hand before each block of the Trainer, so that the same moods of a machine meet both.

    Args:
        by_hand: Does a block.
        size: Steps of a block.
        clock: Seconds; waits before for what was begun, where there is anything to wait for.

    Attributes:
        laps: Seconds of each block, under the Trainer and by hand. A lap of the Trainer ends where its next block
            begins, so that what happens between epochs is in it, and the last block has none.
    """

    def __init__(self, by_hand: Callable[[], None], size: int, clock: Callable[[], float] = time.process_time) -> None:
        self.by_hand, self.size, self.clock, self.steps = by_hand, size, clock, 0
        self.laps: list[tuple[float, float]] = []
        self._hand, self._begin = 0.0, 0.0

    def tick(self) -> None:
        """To be called first in each step of the Trainer."""
        if self.steps % self.size == 0:
            self.border()
        self.steps += 1

    def border(self) -> None:
        """End a block of the Trainer, and run one by hand."""
        end = self.clock()
        if self._begin:
            self.laps.append((end - self._begin, self._hand))
        begin = self.clock()
        self.by_hand()
        self._hand = self.clock() - begin
        self._begin = self.clock()

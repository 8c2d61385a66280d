"""How far a run is, by steps or by the clock, and the learning rate there."""

from __future__ import annotations

import math
import time

WARMUP_SHARE = 0.1  # of the run: the rate rises no longer than that, also when the clock ends the run


class Pace:
    """Progress of a run that ends after ``steps`` steps or ``minutes`` minutes, whichever comes first.

    The clock counts time spent training over all the runs that were resumed.

    Args:
        steps: steps of the whole run.
        minutes: time that it may take; None is any.
    """

    def __init__(self, steps: int, minutes: float | None = None) -> None:
        self.steps, self.minutes = steps, minutes
        self.before = 0.0
        self._start = time.monotonic()

    def start(self, before: float = 0.0) -> None:
        """Start the clock; ``before`` are seconds of earlier runs."""
        self.before, self._start = before, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 at the end."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(step / self.steps, by_time))


def rate(progress: float, step: int, kind: str, warmup: int) -> float:
    """Factor on the highest learning rate.

    Args:
        progress: of the run, from 0 to 1.
        step: steps done so far.
        kind: cosine ((1 + cos(pi progress)) / 2), linear (1 - progress) or constant.
        warmup: steps in which the rate rises linearly; it has risen after a tenth of the run in any case.
    """
    rising = min(1.0, max((step + 1) / (warmup + 1), progress / WARMUP_SHARE))
    falling = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[kind]
    return rising * falling

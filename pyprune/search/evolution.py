"""The search: one parent, children that differ from it by a few moves, and the best of them the next parent.

After EvoPress (Sieberling et al., ICML 2025, arXiv 2410.14649): level switching that keeps the size, several
fidelities, elitism. Where that draws children blindly, a child here is the best of some random moves in the eyes of a
linear model of what was evaluated before (:mod:`pyprune.search.surrogate`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

from pyprune import progress as bars
from pyprune.search.fitness import check_finite
from pyprune.search.moves import Moves, Widths
from pyprune.search.state import State
from pyprune.search.surrogate import sample_slopes

CHILDREN = 8  # a generation
PROPOSALS = 24  # random moves that a child is chosen from
CONFIRMED = 2  # best children of a generation, measured on all tokens
STARTS_CONFIRMED = 3
SCALES = (0.125, 4.0)
VERIFIED = 10  # generations between two times that the best is measured as compensation will treat it


class Measure(Protocol):
    """What the search minimises."""

    steps: Any
    tokens: list[int]

    def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
        """Sum of the divergence over the tokens of steps ``first`` to ``last - 1``."""

    def rebase(self, widths: Mapping[str, int]) -> None:
        """Most candidates will differ little from these widths."""

    def anchor(self, widths: Mapping[str, int]) -> bool:
        """Measure as exactly as can be at these widths; False where every measure is exact."""


@dataclass(frozen=True)
class Limit:
    """When the search ends: after so many generations, so many minutes, whatever comes first; None is no limit."""

    steps: int | None
    minutes: float | None


class Evolution:
    """A search from a state on.

    Args:
        moves: what may change.
        measure: what is minimised.
        state: where it stands; changed in place.
        seed: of whatever is drawn.
        file: where the state goes after every generation.
        started: when this run began (``time.monotonic()``), for the limit in minutes and ``state.seconds``.
    """

    def __init__(
        self, moves: Moves, measure: Measure, state: State, seed: int, file: Path | None, started: float
    ) -> None:
        self.moves, self.measure, self.state, self.seed, self.file = moves, measure, state, seed, file
        self._names = [g.name for g in moves.groups]
        self._units = [g.units for g in moves.groups]
        self._started, self._before = started, state.seconds
        self._screen = (len(measure.steps) + 1) // 2
        self._seen = {tuple(point) for point in state.points}
        self._exact = True

    def start(self, starts: Mapping[str, Widths], anchor: Widths) -> None:
        """Try every start on the screening tokens, the best of them on all; the best is the first parent.

        Args:
            starts: name -> genome.
            anchor: where measures are exact at first.

        Raises:
            PyPruneError: no start's divergence is finite.
        """
        state = self.state
        state.anchor = state.anchor or self._list(anchor)
        self._exact = not self.measure.anchor(self._widths(state.anchor))
        done = {start["name"] for start in state.starts}
        for name, widths in bars.track(list(starts.items()), "first candidates"):
            if name not in done:
                point, found = self._list(widths), self._screened(widths)
                state.starts.append({"name": name, "widths": point, "screening": found, "divergence": None})
                self._save()
        if not state.best:
            ranked = sorted(state.starts, key=lambda start: start["screening"])
            first: dict[str, Any] = {"divergence": math.inf}
            for number, start in enumerate(ranked):
                if number >= STARTS_CONFIRMED and math.isfinite(first["divergence"]):
                    break
                start["divergence"] = self._confirmed(self._widths(start["widths"]), start["screening"])
                first = min(first, start, key=lambda start: start["divergence"])
            check_finite(first["divergence"])
            state.best, state.kl, state.screened = list(first["widths"]), first["divergence"], first["screening"]
            self._mark()
            self._save()

    def run(self, limit: Limit) -> None:
        """Generations until the limit, or until moves of no size lead to anything new.

        Raises:
            PyPruneError: the best divergence is not finite with refits of its own.
        """
        state = self.state
        with bars.bar("searching", limit.steps) as bar:
            bar.advance(state.generation)
            while True:
                bar.say(f"searching, best divergence {state.kl:.4f}")
                over = limit.steps is not None and state.generation >= limit.steps
                if over or state.generation % VERIFIED == 0:
                    self._verify()
                if over:
                    break
                if self._out_of_time(limit) or not self._generation(limit):
                    self._verify()
                    break
                bar.advance()
        check_finite(state.kl)

    def _verify(self) -> None:
        """Measure the best genome with refits made for it; where it is no better than the last one that was measured
        so, go back to that one."""
        state = self.state
        if not self._exact and state.best != state.anchor:
            self.measure.anchor(self._widths(state.best))
            screened = self._again(0, self._screen)
            kl = self._confirmed(self._widths(state.best), screened)
            if state.verified is not None and kl >= state.verified["divergence"]:
                kept = state.verified
                state.best, kl, screened = list(kept["widths"]), kept["divergence"], kept["screening"]
                self.measure.anchor(self._widths(state.best))
            # What was measured before counts beside the new measure as it did beside the old.
            factor = screened / state.kls[state.points.index(state.best)]
            if 0 < factor < math.inf:
                state.kls = [k * factor for k in state.kls]
            state.anchor, state.kl, state.screened = list(state.best), kl, screened
            for start in state.starts:
                if start["widths"] == state.best and start["divergence"] is not None:
                    start["divergence"] = kl  # as what it became
        now = {"widths": list(state.best), "divergence": state.kl, "screening": state.screened}
        if now != state.verified:
            state.verified = now
            self._mark(verified=True)
            self._save()

    def _again(self, first: int, last: int) -> float:
        """Mean divergence of the best genome over some steps."""
        self.state.evaluations += 1
        total = self.measure.total(self._widths(self.state.best), first, last)
        return total / sum(self.measure.tokens[first:last])

    def _generation(self, limit: Limit) -> bool:
        """Whether it was finished in time and more may follow; if not, nothing of it counts."""
        state = self.state
        rng = Random(f"{self.seed}:{state.generation}")
        normal = np.random.default_rng([self.seed, state.generation])
        parent = self._widths(state.best)
        self.measure.rebase(parent)
        marked = len(state.points), state.evaluations
        tried: list[tuple[float, Widths]] = []
        for _ in range(CHILDREN):
            if self._out_of_time(limit):
                for point in state.points[marked[0] :]:
                    self._seen.discard(tuple(point))
                del state.points[marked[0] :], state.kls[marked[0] :]
                state.evaluations = marked[1]
                return False
            child = self._child(parent, rng, normal)
            if child is not None:
                tried.append((self._screened(child), child))
        if not tried and state.scale >= SCALES[1]:
            return False
        tried.sort(key=lambda t: t[0])
        better = False
        for screened, child in tried[:CONFIRMED]:
            if screened >= state.screened:
                break
            found = self._confirmed(child, screened)
            if found < state.kl:
                state.best, state.kl, state.screened, better = self._list(child), found, screened, True
        # Where nothing near is new, moves grow too, so that a search which goes on has something to try.
        state.scale = min(SCALES[1], max(SCALES[0], state.scale * (1.25 if better or not tried else 0.8)))
        state.generation += 1
        if better:
            self._mark()
        self._save()
        return True

    def _child(self, parent: Widths, rng: Random, normal: np.random.Generator) -> Widths | None:
        """The most promising of some new genomes; None when none is found."""
        state = self.state
        base = state.points.index(state.best)
        logs = [math.log(max(kl, 1e-12)) for kl in state.kls]
        slopes = sample_slopes([self._shares(p) for p in state.points], logs, base, normal)
        best, least = None, math.inf
        for _ in range(PROPOSALS):
            found = self.moves.mutated(parent, rng, state.scale)
            if found is None or tuple(self._list(found)) in self._seen:
                continue
            if slopes is None:
                return found
            promised = float(slopes @ np.asarray(self._shares(self._list(found))))
            if promised < least:
                best, least = found, promised
        return best

    def _screened(self, widths: Widths) -> float:
        """Mean divergence on the screening tokens, remembered."""
        self.state.evaluations += 1
        found = self.measure.total(widths, 0, self._screen) / sum(self.measure.tokens[: self._screen])
        point = self._list(widths)
        self.state.points.append(point)
        self.state.kls.append(found)
        self._seen.add(tuple(point))
        return found

    def _confirmed(self, widths: Widths, screened: float) -> float:
        """Mean divergence on all tokens, from that on the screening tokens."""
        tokens, last = self.measure.tokens, len(self.measure.tokens)
        if last == self._screen:
            return screened
        self.state.evaluations += 1
        known = screened * sum(tokens[: self._screen])
        return (known + self.measure.total(widths, self._screen, last)) / sum(tokens)

    def _out_of_time(self, limit: Limit) -> bool:
        return limit.minutes is not None and self._seconds() >= 60 * limit.minutes

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _mark(self, verified: bool = False) -> None:
        s = self.state
        s.history.append({
            "generation": s.generation, "evaluations": s.evaluations, "divergence": s.kl, "verified": verified,
            "seconds": round(self._seconds(), 1),
        })  # fmt: skip

    def _save(self) -> None:
        self.state.seconds = self._seconds()
        self.state.save(self.file)

    def _list(self, widths: Mapping[str, int]) -> list[int]:
        return [widths[name] for name in self._names]

    def _widths(self, point: list[int]) -> Widths:
        return dict(zip(self._names, point, strict=True))

    def _shares(self, point: list[int]) -> list[float]:
        return [w / u for w, u in zip(point, self._units, strict=True)]

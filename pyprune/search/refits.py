"""Refitted matrices for any widths, from Gram matrices of their inputs that are collected once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.compensation.refit import Sums, solve
from pyprune.compensation.triangle import mirrored, upper
from pyprune.errors import PyPruneError
from pyprune.importance.memory import trim_heap
from pyprune.importance.steps import Step
from pyprune.importance.taps import Key
from pyprune.importance.walk import Walk, weigh_tokens, weights_for
from pyprune.search.masking import Exchanged, Masking, zero_columns
from pyprune.search.sites import Sites

PENALTY = 0.03  # in the middle of what the compensation stage chooses on held-out tokens
CACHED = 1.2  # refitted matrices that are kept, in multiples of all matrices that are refitted


@dataclass(frozen=True)
class Triangle:
    """Mean products of a matrix's inputs, [size, size], the upper half of it: float32 [size (size + 1) / 2]; from how
    many inputs."""

    values: Tensor
    size: int
    rows: int


class Refits:
    """What each matrix is exchanged for at given widths.

    Args:
        model: the dense model.
        sites: where units are masked.
        mode: ``least-squares`` (also for ``obs``), ``bias`` or ``none``, as in :func:`pyprune.compensation.compensate`.
        cache_bytes: of refitted matrices that are kept, those used last; None: 1.2 times what all of them take.

    Attributes:
        grams: matrix -> mean products of its inputs (and of a one where a bias is added), float32: the memory that the
            search takes beside the model, as long as ``mode`` asks for them.
    """

    def __init__(self, model: nn.Module, sites: Sites, mode: str, cache_bytes: int | None = None) -> None:
        self.model = model
        self.sites, self.mode = sites, mode
        if cache_bytes is None:
            parameters = dict(model.named_parameters())
            cache_bytes = int(CACHED * sum(parameters[n].numel() * parameters[n].element_size() for n in sites.read))
        self.cache_bytes = cache_bytes
        self.grams: dict[Key, Triangle] = {}
        self._whole: set[str] = set()  # sites that are not masked yet, while inputs are collected
        self._cache: OrderedDict[tuple[Key, tuple[int, ...]], Exchanged] = OrderedDict()
        self._bytes = 0

    def at(self, widths: Mapping[str, int], masking: Masking) -> None:
        """Let ``masking`` compute the model with ``widths``; groups not named stay whole."""

        def exchange(key: Key, weight: Tensor, bias: Tensor | None) -> Exchanged | None:
            made = self.sites.made.get(key.name)
            zero = None if made is None else torch.from_numpy(self.sites.gone(made, widths)).to(weight.device)
            if key.name not in self.sites.read:
                return Exchanged(weight, zero=zero)
            new = self._matrix(key, weight, bias, widths)
            return Exchanged(new.weight, new.bias, zero)

        masking.exchange = exchange

    def clear(self) -> None:
        """Drop all sums and what was made from them."""
        self.grams.clear()
        self._cache.clear()
        self._bytes = 0

    def collect(self, steps: Sequence[Step], masking: Masking, weighting: str, anchor: Mapping[str, int]) -> None:
        """Gram matrices over ``steps``.

        Every matrix sees the inputs that the blocks in front of it give when they are cut to ``anchor`` and refitted,
        so that what later layers make up for is what a cut model hands them, as in the compensation stage.

        Raises:
            PyPruneError: inputs with NaN or infinity.
        """
        self.clear()
        self._whole = set(self.sites.read) if self.mode != "none" else set()
        if self.mode == "none":
            return
        walk = Walk(self.model, steps)  # its trial run needs gradients, which masked products do not give
        self.at(anchor, masking)
        with masking, bars.bar("collecting inputs", len(walk.blocks)) as bar:
            for i in range(len(walk.blocks)):
                names = [s.name for s in self.sites.read.values() if s.block == i]
                for name in names:
                    self._add(walk, i, name, masking.watched[name], weighting)
                walk.advance(i)
                bar.advance()
        del walk
        trim_heap(steps[0].targets.device)  # its steps are longer than those that candidates are measured on

    def _add(self, walk: Walk, i: int, name: str, p: nn.Parameter, weighting: str) -> None:
        found: dict[Key, Sums] = {}
        for number, uses, stream in walk.run(i, {name: p}):
            weights = weigh_tokens(walk.steps[number], stream, weighting if self.mode != "bias" else "equal")
            for use in uses:
                x = use.x if use.bias is None else torch.cat([use.x, use.x.new_ones(len(use.x), 1)], dim=1)
                if use.key not in found:
                    wide = torch.promote_types(x.dtype, torch.float32)
                    found[use.key] = Sums(x.new_zeros(x.shape[1], x.shape[1], dtype=wide))
                found[use.key].add(x, weights_for(x, weights, use.tokens))
        for key, sums in found.items():
            if not bool(sums.gram.isfinite().all()):
                hint = "Load the model in float32 or bfloat16, and look at the calibration text."
                raise PyPruneError("model", key.name, "is given inputs with NaN or infinity", hint)
            # Scale changes nothing in a refit, and mean values keep float32 from running over.
            sums.gram /= max(1, sums.rows)
            self.grams[key] = Triangle(upper(sums.gram), len(sums.gram), sums.rows)
        self._whole.discard(name)

    def _matrix(self, key: Key, weight: Tensor, bias: Tensor | None, widths: Mapping[str, int]) -> Exchanged:
        if key.name in self._whole:
            return Exchanged(weight)
        site = self.sites.read[key.name]
        entry = (key, self.sites.key(site, widths))
        if entry in self._cache:
            self._cache.move_to_end(entry)
            return self._cache[entry]
        gone = self.sites.gone(site, widths)
        if not len(gone):
            return Exchanged(weight)
        found = self._exchanged(key, weight, bias, torch.from_numpy(gone).to(weight.device))
        self._cache[entry] = found
        self._bytes += _bytes(found)
        while self._bytes > self.cache_bytes and len(self._cache) > 1:
            self._bytes -= _bytes(self._cache.popitem(last=False)[1])
        return found

    def _exchanged(self, key: Key, weight: Tensor, bias: Tensor | None, gone: Tensor) -> Exchanged:
        half = self.grams.get(key)
        plain = Exchanged(zero_columns(weight, gone))
        if half is None or not half.rows:  # nothing asked for, or an expert that no token reached
            return plain
        gram = mirrored(half.values, half.size)
        if self.mode == "bias":
            if bias is None:
                return plain
            means = gram[:-1, -1].double() / gram[-1, -1].double()
            moved = bias.double() + weight[:, gone].double() @ means[gone]
            return Exchanged(plain.weight, moved.to(bias.dtype))
        wide = weight.double()
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[gone] = False
        if bias is not None:
            wide = torch.cat([wide, bias.double()[:, None]], dim=1)
            stays = torch.cat([stays, stays.new_ones(1)])
        kept = stays.nonzero()[:, 0]
        rows = gram[kept].double()
        here = torch.arange(len(kept), device=kept.device)
        fitted = solve(rows[:, kept], rows @ wide.t(), wide[:, kept], here, penalty(len(kept), half.rows))
        if fitted is None or not bool(fitted.isfinite().all()):
            return plain
        out = torch.zeros_like(wide)
        out[:, kept] = fitted
        columns = weight.shape[1]
        new_bias = None if bias is None else out[:, columns].to(bias.dtype)
        return Exchanged(out[:, :columns].to(weight.dtype).contiguous(), new_bias)


def penalty(kept: int, rows: int) -> float:
    """lam of a refit of ``kept`` inputs on ``rows`` tokens: with few tokens (an expert's) columns stay near what they
    were, as fitting noise would do harm."""
    return PENALTY * max(1.0, 4 * kept / rows)


def _bytes(found: Exchanged) -> int:
    return found.weight.numel() * found.weight.element_size()

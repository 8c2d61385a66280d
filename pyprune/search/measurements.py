"""Measurements that stay on the disk, so that a killed descent goes on and the same one again measures nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from pyprune.importance.cache import keep_file
from pyprune.search.evolution import Measure

log = logging.getLogger(__name__)

FORMAT = "pyprune-measurements"
VERSION = 2


class Remembered:
    """A measure that asks another one only for what its file does not hold; refits are made no sooner than that.

    Args:
        measure: what is asked.
        file: JSON file of the measurements, written after each; a damaged one is named in a warning and made anew.
        fingerprint: of all that the measurements depend on.
    """

    def __init__(self, measure: Measure, file: Path, fingerprint: str) -> None:
        self._measure, self._file, self._fingerprint = measure, file, fingerprint
        self.steps, self.tokens = measure.steps, measure.tokens
        self._anchor: dict[str, int] = {}
        self._base: dict[str, int] = {}
        self._made: dict[str, int] | None = None  # the anchor that refits are there for
        self._known: dict[str, float] = self._read()

    def anchor(self, widths: Mapping[str, int]) -> bool:
        self._anchor = dict(widths)
        return True

    def rebase(self, widths: Mapping[str, int]) -> None:
        self._base = dict(widths)

    def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
        key = json.dumps([sorted(self._anchor.items()), sorted(widths.items()), first, last])
        if key not in self._known:
            if self._made != self._anchor:
                self._measure.anchor(self._anchor)
                self._made = dict(self._anchor)
            if self._base:
                self._measure.rebase(self._base)
            self._known[key] = self._measure.total(widths, first, last)
            self._save()
        return self._known[key]

    def _save(self) -> None:
        named = {"format": FORMAT, "version": VERSION, "fingerprint": self._fingerprint}
        text = json.dumps({**named, "totals": self._known})
        keep_file(self._file, lambda work: work.write_text(text, encoding="utf-8"), "the measurements are not kept")

    def _read(self) -> dict[str, float]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
            if (data["format"], data["version"], data["fingerprint"]) == (FORMAT, VERSION, self._fingerprint):
                return {str(k): float(v) for k, v in data["totals"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        log.warning("%s does not hold measurements of this model and request; they are made anew", self._file)
        return {}

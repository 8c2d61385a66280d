"""What a stage took."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from pyprune.evaluation.stages import Stages, measured

MEBIBYTE = 2**20


def test_the_peak_of_a_stage_is_its_own_not_an_earlier_ones() -> None:
    stages = Stages()  # which gives back what earlier tests freed: the block could lie in it
    with stages("large"):
        block = np.ones(200 * MEBIBYTE, dtype=np.uint8)
        time.sleep(0.05)
        del block
    with stages("small"):
        time.sleep(0.05)
    large, small = (s["peak_memory"] for s in stages.to_list())
    assert large - small > 150 * MEBIBYTE


def test_a_stage_that_fails_is_measured_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), measured("broken") as stage:
        time.sleep(0.02)
        raise RuntimeError("inside")
    assert stage.seconds >= 0.02
    assert stage.peak_memory > 0


def test_stages_of_a_run_are_listed_in_order_also_the_one_that_failed() -> None:
    stages = Stages()
    with stages("load"):
        pass
    with pytest.raises(RuntimeError, match="inside"), stages("score", bar=False):
        raise RuntimeError("inside")
    assert [s["name"] for s in stages.to_list()] == ["load", "score"]
    assert all(s["peak_memory"] > 0 for s in stages.to_list())


def test_memory_that_a_stage_freed_is_not_counted_in_the_next() -> None:
    stages = Stages()
    with stages("many small blocks"):
        blocks = [bytearray(50_000) for _ in range(4000)]  # below the size that the C library maps on its own
        kept = blocks[-1]
        del blocks
    with stages("next"):
        time.sleep(0.05)
    first, second = (s["peak_memory"] for s in stages.to_list())
    assert first - second > 100 * MEBIBYTE
    assert len(kept) == 50_000


def test_seconds_are_those_of_the_clock(monkeypatch) -> None:
    clock = SimpleNamespace(now=40.0)
    monkeypatch.setattr("pyprune.evaluation.stages.time", SimpleNamespace(perf_counter=lambda: clock.now))
    with measured("waiting") as stage:
        clock.now += 2.5
    assert stage.to_dict()["name"] == "waiting" and stage.to_dict()["seconds"] == stage.seconds == 2.5

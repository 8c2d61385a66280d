"""Seconds and peak memory of the stages of a run, for the process and for the GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyprune import progress

PERIOD = 0.02  # seconds between two looks at the resident size


@dataclass
class Stage:
    """What a stage took.

    Attributes:
        name: the stage.
        seconds: wall-clock time.
        peak_memory: largest resident size of the process while it ran, in bytes (weights included).
        peak_gpu_memory: largest sizes of PyTorch's allocations on the GPUs in bytes, added up; None without one.
    """

    name: str
    seconds: float = 0.0
    peak_memory: int = 0
    peak_gpu_memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _gpus() -> range:
    """Those that this process may be using, if it is using any."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return range(torch.cuda.device_count() if used else 0)


def _await_gpus() -> None:
    """Wait for the work of those that hold something of this process: on others a wait alone would take memory."""
    for index in _gpus():
        if torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)


@contextmanager
def measured(name: str) -> Iterator[Stage]:
    """Measure the block; the yielded :class:`Stage` is filled in when it ends, also by an exception.

    The system's own high-water mark is exact but covers the whole process life, so it counts when it rose during the
    block. Otherwise the block stayed below an earlier one, and the resident size sampled every 20 ms is the figure.
    """
    stage = Stage(name)
    _await_gpus()
    for index in _gpus():
        torch.cuda.reset_peak_memory_stats(index)
    mark, start, sampler = _high_water(), time.perf_counter(), _Sampler()
    sampler.start()
    try:
        yield stage
    finally:
        _await_gpus()
        if _gpus():
            stage.peak_gpu_memory = sum(map(torch.cuda.max_memory_allocated, _gpus()))
        stage.seconds = time.perf_counter() - start
        sampler.stop()
        after = _high_water()
        stage.peak_memory = after if after > mark else sampler.peak


class Stages:
    """The stages of a run, in order::

    stages = Stages()
    with stages("load"):
        ...
    """

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextmanager
    def __call__(self, name: str, bar: bool = True) -> Iterator[None]:
        """Measure a stage; ``bar`` shows a line while it runs, for stages that show none of their own."""
        _release()
        with measured(name) as stage, progress.bar(name) if bar else nullcontext():
            self.done.append(stage)
            yield

    def to_list(self) -> list[dict[str, Any]]:
        return [stage.to_dict() for stage in self.done]


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.peak = _resident()

    def run(self) -> None:
        while not self._done.wait(PERIOD):
            self.peak = max(self.peak, _resident())

    def stop(self) -> None:
        self._done.set()
        self.join()
        self.peak = max(self.peak, _resident())


def _release() -> None:
    """Give freed memory back to the system: the C library keeps it, and the next stage would seem to need it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Resident size of the process now, in bytes; the high-water mark where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _high_water()


def _high_water() -> int:
    """Largest resident size since the process started, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

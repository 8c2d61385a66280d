"""Time, memory and ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pyprune.errors import PyPruneError

Work = Callable[[], object]

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs: their median and the distance between their quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) < 2:
            return cls(seconds[0], 0.0)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), high - low)


AHEAD = 50_000_000  # clock cycles of a GPU, about 25 ms
MOST_AHEAD = 16 * AHEAD  # for what waits for the GPU itself, which no time is enough for


def seconds(work: Work, device: torch.device, ahead: int = 0) -> tuple[float, int]:
    """How long one run takes: by events on the current stream of a GPU, by the clock elsewhere.

    With ``ahead`` the GPU is kept busy until the host has queued the run: the GPU's own time, without the host's. That
    many clock cycles are tried first, and twice as many where the GPU came to the run before the host was done with it.

    Returns:
        the seconds, and the cycles that were enough.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, ahead
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        torch.cuda.synchronize(device)
        if ahead:
            torch.cuda._sleep(ahead)
        begin.record()
        work()
        end.record()
        late = bool(ahead) and begin.query()
        end.synchronize()
        if not late or ahead >= MOST_AHEAD:
            return begin.elapsed_time(end) / 1000, ahead
        ahead *= 2


def interleaved(works: Mapping[str, Work], rounds: int, device: torch.device, ahead: bool = False) -> dict[str, Timing]:
    """Every work once to warm up, then once a round, in turn, so that all of them see the same machine."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    enough = dict.fromkeys(works, AHEAD if ahead else 0)
    for _ in range(rounds):
        for name, work in works.items():
            once, enough[name] = seconds(work, device, enough[name])
            taken[name].append(once)
    return {name: Timing.of(values) for name, values in taken.items()}


def copy_work(device: torch.device) -> tuple[Work, int]:
    """A copy in memory, and the bytes that it reads and writes."""
    size = COPY_BYTES[device.type]
    # Bits as they come: a memory, too, is at its best with nothing but zeros.
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def product_work(device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    """A product of two large square matrices, and its operations."""
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # unknown: the system itself will say


def check_memory(what: str, shapes: str, needed: int, device: torch.device) -> None:
    """Raises PyPruneError when ``needed`` bytes are more than there are."""
    free = available_bytes(device)
    if needed > free:
        raise PyPruneError(
            "shapes", shapes, f"needs {needed / 2**30:.1f} GiB for {what}, and {free / 2**30:.1f} GiB are free",
            "Choose smaller shapes, another --what, or a 16-bit --dtype.",
        )  # fmt: skip

"""Speed of the CPU kernels beside stock PyTorch and beside the memory, on the matrices of SmolLM2-135M.

    python benchmarks/cpu_kernels.py [--threads 1 2] [--rounds 15] [--only salience slicing channels]

Every round times each contender once, in turn, so that a machine whose speed drifts slows all of them alike; ratios
are medians over the rounds of the ratio within a round. One thread is timed in CPU seconds, which other programs
disturb less, several by the clock on the wall. The ceiling is ``Tensor.copy_`` between two 256 MiB tensors, counted as
bytes read plus bytes written, timed in the same rounds.

Memory for results and temporaries comes in two ways:

new   each call is the first one of a process of its own, forked for it, and fetches the pages that it writes: a call
      whose results are kept, as when a model is pruned, or a batch is scored once (one thread, Linux with glibc)
held  what is freed stays with the process and is written again: calls in a loop, at best

Which of the two a loop of one's own sees depends on what the process allocated before, for glibc hands memory back
at thresholds that move.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyprune import ops

LAYERS, HIDDEN, KV, FFN, VOCABULARY = 30, 576, 192, 1536, 49152
LAYER = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)]
MATRICES = [*LAYER * LAYERS, (VOCABULARY, HIDDEN)]
HEAD, HEADS, KV_HEADS, CUT = 64, 9, 3, 4
MODEL = "the whole model"  # all matrices that lose heads or FFN channels, rows and columns
SLICES = ["rows", "FFN columns", "head columns", "rows and columns", MODEL]
SLICES += ["embedding rows", "embedding columns"]
PARTS = ["salience", "slicing", "channels"]
HEADER = """\
| what | beside | its ms | ours, ms | ratio | GB/s | percent of a copy |
|---|---|---|---|---|---|---|"""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LIBC = ctypes.CDLL(None)
Contenders = dict[str, Callable[[], object]]


def timed(work: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = work()
    seconds = clock() - start
    del result  # freeing is not timed
    return seconds


def timed_first(work: Callable[[], object]) -> float:
    """As :func:`timed`, in a child that inherits no free memory."""
    LIBC.malloc_trim(ctypes.c_size_t(0))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, struct.pack("d", timed(work)))
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 8)
    os.close(reader)
    os.waitpid(child, 0)
    if len(answer) != 8:
        raise RuntimeError("a contender failed in its own process")
    return float(struct.unpack("d", answer)[0])


def rounds_of(contenders: Contenders, rounds: int, memory: str) -> dict[str, list[float]]:
    """Seconds of each contender in each round; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            own = memory == "new" and name != "copy"
            seconds[name].append(timed_first(work) if own else timed(work))
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


class Copy:
    """The ceiling: a plain copy within memory."""

    def __init__(self) -> None:
        self.source = torch.zeros(64 << 20)
        self.dest = torch.ones(64 << 20)
        if memories():
            # Pages that were shared with a child cost a fault each when they are written again.
            page, dont_fork = os.sysconf("SC_PAGE_SIZE"), 10
            for tensor in (self.source, self.dest):
                begin = -(-tensor.data_ptr() // page) * page
                length = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
                LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), dont_fork)

    def __call__(self) -> None:
        self.dest.copy_(self.source)

    def share(self, seconds: dict[str, list[float]], name: str, moved: int) -> float:
        """Percent of the copy's bytes a second that ``name`` reaches when it moves ``moved`` bytes."""
        return 100 * ratio(seconds, "copy", name) * moved / (2 * self.source.nbytes)


def eager_salience(weights: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """|w * g| summed over rows and over columns in float32, as one writes it."""
    out = []
    for w, g in zip(weights, grads, strict=True):
        s = (w.float() * g.float()).abs()
        out.append((s.sum(1), s.sum(0)))
    return out


def eager_16_bit_products(weights: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The same with products rounded to bfloat16 before they are summed in float32: less exact and quicker."""
    out = []
    for w, g in zip(weights, grads, strict=True):
        s = (w * g).abs()
        out.append((s.sum(1, dtype=torch.float32), s.sum(0, dtype=torch.float32)))
    return out


def salience(dtype: torch.dtype, rounds: int, memory: str, copy: Copy) -> list[str]:
    weights = [torch.randn(shape).to(dtype) for shape in MATRICES]
    grads = [torch.randn(shape).to(dtype) for shape in MATRICES]
    moved = sum(t.nbytes for t in weights + grads)
    contenders: Contenders = {
        "copy": copy,
        "eager": lambda: eager_salience(weights, grads),
        "ops": lambda: ops.salience("taylor_abs", weights, grads),
    }
    if dtype == torch.bfloat16:
        contenders["rounded"] = lambda: eager_16_bit_products(weights, grads)
    seconds = rounds_of(contenders, rounds, memory)
    name = f"salience, {NAMES[dtype]}, {memory}"
    share = copy.share(seconds, "ops", moved)
    lines = [line(name, "float32 eager", seconds, "eager", share, moved)]
    if dtype == torch.bfloat16:
        lines.append(line(name, "eager, bfloat16 products", seconds, "rounded", share, moved))
    return lines


def some(count: int, kept: int, width: int = 1) -> np.ndarray:
    """``kept`` of ``count`` blocks of ``width`` neighbouring positions, ascending, the same on every run."""
    blocks = np.sort(np.random.default_rng(count).choice(count, kept, replace=False))
    return np.add.outer(blocks * width, np.arange(width)).ravel()


def slices(what: str) -> tuple[list[tuple[int, int]], list[dict[int, np.ndarray]]]:
    """Shapes and kept positions when a quarter of the KV heads' groups and of the FFN channels goes."""
    heads = some(HEADS, HEADS - HEADS // CUT, HEAD)
    kv = some(KV_HEADS, KV_HEADS - 1, HEAD)
    ffn = some(FFN, FFN - FFN // CUT)
    hidden = some(HIDDEN, HIDDEN - HIDDEN // CUT)
    kept: dict[str, list[tuple[tuple[int, int], dict[int, np.ndarray]]]] = {
        "rows": [
            ((HIDDEN, HIDDEN), {0: heads}), ((KV, HIDDEN), {0: kv}), ((KV, HIDDEN), {0: kv}),
            ((FFN, HIDDEN), {0: ffn}), ((FFN, HIDDEN), {0: ffn}),
        ],
        "columns": [((HIDDEN, HIDDEN), {1: heads}), ((HIDDEN, FFN), {1: ffn})],
        "FFN columns": [((HIDDEN, FFN), {1: ffn})],
        "head columns": [((HIDDEN, HIDDEN), {1: heads})],
        "rows and columns": [
            ((HIDDEN, HIDDEN), {0: heads, 1: hidden}), ((KV, HIDDEN), {0: kv, 1: hidden}),
            ((FFN, HIDDEN), {0: ffn, 1: hidden}), ((HIDDEN, FFN), {0: hidden, 1: ffn}),
        ],
    }  # fmt: skip
    kept[MODEL] = [*kept["rows"], *kept["columns"]]
    cases = kept.get(what, []) * LAYERS
    if what == "embedding columns":
        cases = [((VOCABULARY, HIDDEN), {1: hidden})]
    if what == "embedding rows":
        cases = [((VOCABULARY, HIDDEN), {0: some(VOCABULARY, VOCABULARY - VOCABULARY // CUT)})]
    return [shape for shape, _ in cases], [index for _, index in cases]


def slicing(dtype: torch.dtype, what: str, rounds: int, memory: str, copy: Copy) -> list[str]:
    shapes, indices = slices(what)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    positions = [{d: torch.from_numpy(kept) for d, kept in index.items()} for index in indices]

    def select() -> list[Tensor]:
        out = []
        for tensor, index in zip(tensors, positions, strict=True):
            for dim, kept in index.items():
                tensor = tensor.index_select(dim, kept)
            out.append(tensor)
        return out

    moved = 2 * sum(t.nbytes for t in select())
    contenders: Contenders = {
        "copy": copy,
        "eager": select,
        "ops": lambda: ops.gather(tensors, indices),
    }
    seconds = rounds_of(contenders, rounds, memory)
    name = f"slicing {what}, {NAMES[dtype]}, {memory}"
    return [line(name, "index_select", seconds, "eager", copy.share(seconds, "ops", moved), moved)]


def channels(dtype: torch.dtype, rounds: int, memory: str, copy: Copy) -> list[str]:
    """Activations of 32 samples of 1024 tokens at the FFN's width."""
    a, b = (torch.randn(32, 1024, FFN).to(dtype) for _ in range(2))

    def moments() -> tuple[Tensor, Tensor]:
        x = a.float()
        return x.sum((0, 1)), (x * x).sum((0, 1))

    cases: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "channel moments": (moments, lambda: ops.channel_moments(a), a.nbytes),
        "channel dots": (lambda: (a.float() * b.float()).sum(1), lambda: ops.channel_dots(a, b), 2 * a.nbytes),
    }
    lines = []
    for name, (eager, ours, moved) in cases.items():
        seconds = rounds_of({"copy": copy, "eager": eager, "ops": ours}, rounds, memory)
        share = copy.share(seconds, "ops", moved)
        lines.append(line(f"{name}, {NAMES[dtype]}, {memory}", "float32 eager", seconds, "eager", share, moved))
    return lines


def line(name: str, rival: str, seconds: dict[str, list[float]], eager: str, share: float, moved: int) -> str:
    ours, theirs = statistics.median(seconds["ops"]), statistics.median(seconds[eager])
    gb = moved / ours / 1e9
    return (
        f"| {name} | {rival} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | {ratio(seconds, eager, 'ops'):.2f} | "
        f"{gb:.1f} | {share:.0f} |"
    )


def keep_freed_memory() -> None:
    """No allocation of its own mapping, and no trimming of the heap, where the C library is glibc."""
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(mmap_max, 0)
        LIBC.mallopt(trim_threshold, 2**31 - 1)


def memories() -> list[str]:
    """The kinds of memory that can be measured here; ``held`` last, for that stays."""
    return ["new", "held"] if hasattr(LIBC, "malloc_trim") else ["held"]


def load_everything() -> None:
    """Libraries and operators that a first call loads, which is not what the children measure."""
    for dtype in NAMES:
        x = torch.ones(4, 4, dtype=dtype)
        ops.gather([x], [{0: [0], 1: [1]}])
        ops.salience("taylor_abs", [x], [x])
        ops.channel_moments(x)
        ops.channel_dots(x, x, samples=2)
        eager_salience([x], [x])
        eager_16_bit_products([x], [x])
        (x.float() * x.float()).sum((0, 1))
        x.index_select(1, torch.tensor([0]))


def processor() -> str:
    """Its name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    family = {key.strip(): value.strip() for key, _, value in (text.partition(":") for text in lines)}
    return f"{family.get('model name', 'unknown')} (family {family.get('cpu family', '?')})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # children may not inherit a pool of threads
    load_everything()
    copy = Copy()
    print(
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start,"
    )
    print(f"torch {torch.__version__}, kernels for {ops.backend_info()['cpu_isa']}, {args.rounds} rounds")
    for memory in memories():
        if memory == "held":
            keep_freed_memory()
        for threads in args.threads if memory == "held" else {1} & set(args.threads):
            torch.set_num_threads(threads)
            print(f"\n{threads} thread{'s' if threads > 1 else ''}, {memory} memory\n")
            print(HEADER)
            for dtype in NAMES:
                if "salience" in args.only:
                    print("\n".join(salience(dtype, args.rounds, memory, copy)), flush=True)
                if "channels" in args.only:
                    print("\n".join(channels(dtype, args.rounds, memory, copy)), flush=True)
                if "slicing" in args.only:
                    for what in SLICES:
                        print("\n".join(slicing(dtype, what, args.rounds, memory, copy)), flush=True)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()

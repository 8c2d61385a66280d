"""The cases of ``pyprune bench`` at small sizes, for pytest-benchmark: kernel and eager formula side by side.

python -m pytest benchmarks/test_kernels.py --benchmark-group-by=param:case [-k cuda]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyprune.bench.cases import CASES, Case

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")),
]
NAMES = [
    (part, i)
    for part, count in (("salience", 2), ("many", 2), ("slice", 3), ("moments", 4), ("activations", 3))
    for i in range(count)
]


def case_of(part: str, index: int, device: str) -> Case:
    return list(CASES[part]("tiny", torch.float32, torch.device(device)))[index]


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", NAMES, ids=[f"{part}-{i}" for part, i in NAMES])
def test_time(case: tuple[str, int], device: str, side: str, benchmark: Any) -> None:
    found = case_of(*case, device)
    if found.ours is None:
        pytest.skip(found.missing)
    work = found.ours if side == "ours" else found.stock(found.eager)

    def call() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["op"] = found.op
    benchmark(call)

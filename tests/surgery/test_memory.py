"""Applying a plan keeps at most one decoder layer in memory twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import gc, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import helpers_surgery as h
from pyprune.surgery import apply

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

size = dict(hidden_size=512, head_dim=64, intermediate_size=8192, num_hidden_layers=12)
apply(h.tiny("llama"), h.uniform(h.tiny("llama")))  # imports and compiled code are there
model = h.tiny("llama", **size)
plan = h.uniform_plan(h.groups_of(model), kv_heads=3, ffn=6144)
gc.collect()
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
small = apply(model, plan)
layer = sum(p.numel() for p in small.model.layers[0].parameters()) * 4
total = sum(p.numel() for p in small.parameters()) * 4
print(memory("VmHWM") - before, layer, total)
"""


@pytest.mark.slow
def test_the_peak_is_one_layer_above_the_model():
    tests = Path(__file__).resolve().parents[1]
    code = MEASURE.format(root=str(tests.parent), tests=str(tests))
    # Freed blocks go back to the system at once, so that resident memory is what is live.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    growth, layer, total = (int(n) for n in done.stdout.split())
    assert total > 10 * layer
    assert growth <= 2 * layer

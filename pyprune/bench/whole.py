"""Scoring of a whole random model, beside LLM-Pruner's procedure in stock PyTorch: time and peak memory.

    python -m pyprune.bench.whole SIDE --shapes smollm2 --dtype float32 --criterion param_second

scores once in this process and prints seconds and peak memory as JSON: on a CPU the peak is that of a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.bench.cases import SAMPLES, TOKENS
from pyprune.bench.measure import check_memory
from pyprune.bench.shapes import SHAPES

CRITERIA = ("param_first", "param_second")
SIDES = ("ours", "llm_pruner")
ROLES = ("kv_heads", "ffn")


def measure(shapes: str, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """For each criterion: ``criterion``, ``tokens``, and by side ``seconds`` (of each round) and ``peak`` (bytes)."""
    elements = SHAPES[shapes].elements()
    # Weights, gradients, squares, and one more while a gradient is squared.
    check_memory("scoring", shapes, int(4 * elements * dtype.itemsize) + (2 << 30), device)
    run = _in_this_process(shapes, dtype, device) if device.type == "cuda" else _in_processes(shapes, dtype)
    for criterion in CRITERIA:
        found: dict[str, Any] = {"criterion": criterion, "tokens": SAMPLES * TOKENS}
        for side in SIDES:
            found[side] = {"seconds": [], "peak": 0}
        for i in range(rounds + (device.type == "cuda")):
            for side in SIDES:
                taken, peak = run(side, criterion)
                if i == 0 and device.type == "cuda":
                    continue  # the first round warms up: streams, libraries, memory pools
                found[side]["seconds"].append(taken)
                found[side]["peak"] = max(found[side]["peak"], peak)
        yield found


def make_model(shapes: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A random Llama and the token ids [samples, tokens] to score it on."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(SHAPES[shapes].config()).eval()
    finally:
        torch.set_default_dtype(before)
    return model, torch.randint(SHAPES[shapes].vocab, (SAMPLES, TOKENS), device=device)


def ours(model: nn.Module, groups: Any, ids: Tensor, criterion: str) -> Any:
    """pyprune's scoring of the groups that LLM-Pruner scores."""
    from pyprune.importance import score

    return score(model, groups, [{"input_ids": ids}], criterion, roles=ROLES, route="activations")


def llm_pruner(
    model: nn.Module, ids: Tensor, criterion: str, batch_pass: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """The procedure of Ma et al. 2023 (arXiv 2305.11627) in stock PyTorch: row and column sums of every matrix.

    Second order: a backward pass for each sample, the square of every parameter's gradient added to a buffer of the
    parameter's size. Either order: one backward pass over all samples, whose gradients stay (their code makes it for
    the second order too, where nothing needs it; without ``batch_pass`` it is left out there). Then the importance,
    layer by layer.
    """
    model.requires_grad_(True)
    squares: dict[str, Tensor] = {}
    if criterion == "param_second":
        for sample in ids:
            model(input_ids=sample[None], labels=sample[None], use_cache=False).loss.backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                square = p.grad * p.grad / len(ids)
                squares[name] = squares[name] + square if name in squares else square
                p.grad = None
    if batch_pass or not squares:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    out = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            other = squares.get(name, p.grad)
            if p.dim() == 2 and other is not None:
                element = p * other * p if squares else p * other
                out[name] = element.abs().sum(1), element.abs().sum(0)
            p.grad = None
    model.requires_grad_(False)
    return out


def _in_this_process(shapes: str, dtype: torch.dtype, device: torch.device) -> Any:
    from pyprune.discovery import discover

    model, ids = make_model(shapes, dtype, device)
    model.requires_grad_(False)
    groups = discover(model)

    def run(side: str, criterion: str) -> tuple[float, int]:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        once(side, model, groups, ids, criterion)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(device)

    return run


def once(side: str, model: nn.Module, groups: Any, ids: Tensor, criterion: str) -> None:
    """One scoring by either side."""
    if side == "ours":
        ours(model, groups, ids, criterion)
    else:
        llm_pruner(model, ids, criterion)


def _in_processes(shapes: str, dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")

    def run(side: str, criterion: str) -> tuple[float, int]:
        command = [sys.executable, "-m", "pyprune.bench.whole", side, "--shapes", shapes, "--dtype", name]
        ended = subprocess.run([*command, "--criterion", criterion], capture_output=True, text=True)
        if ended.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr}")
        found = json.loads(ended.stdout.splitlines()[-1])
        return found["seconds"], found["peak"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--shapes", choices=SHAPES, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--criterion", choices=CRITERIA, required=True)
    args = parser.parse_args()
    import resource

    from pyprune.discovery import discover

    model, ids = make_model(args.shapes, getattr(torch, args.dtype), torch.device("cpu"))
    groups = discover(model)
    start = time.perf_counter()
    once(args.side, model, groups, ids, args.criterion)
    taken = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"seconds": taken, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}))


if __name__ == "__main__":
    main()

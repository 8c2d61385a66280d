"""How long discovery takes and how it grows with depth, on the meta device; beside Torch-Pruning where it is installed.

    python benchmarks/discovery.py [--layers 16 32 64]

The first table is a Llama 4096 wide with 8 KV heads, without weights, each in a process of its own. The second compares
with building Torch-Pruning's graph (``pip install --no-deps torch-pruning==1.5.2``) for a 32-layer multi-head
Llama of hidden size 1024 with weights, both in one process.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import discover


def llama(layers: int, hidden: int, heads: int, kv_heads: int, device: str) -> Any:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    config.use_cache = False  # Torch-Pruning's graph takes plain outputs only
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def timed(work: Any) -> float:
    """CPU seconds, which other processes on the machine change less than the time that passes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def alone(layers: int) -> None:
    """CPU seconds and peak memory (MiB) of one discovery, the second in the process so that imports are not counted."""
    discover(llama(2, 256, 8, 2, "meta"))
    model = llama(layers, 4096, 32, 8, "meta")
    print(f"{timed(lambda: discover(model)):.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--only", type=int, help="measure this depth in this process")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.only:
        alone(args.only)
        return
    print("# Discovery\n\n| layers | CPU seconds | peak memory of the process, MiB |\n|---|---|---|")
    for layers in args.layers:
        command = [sys.executable, __file__, "--only", str(layers)]
        taken, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"| {layers} | {taken} | {peak} |", flush=True)
    if importlib.util.find_spec("torch_pruning") is not None:
        import torch_pruning

        torch.set_num_threads(1)
        model = llama(32, 1024, 16, 16, "cpu")
        inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
        seconds: dict[str, list[float]] = {"graph": [], "graph and groups": [], "discovery": []}
        for _ in range(args.rounds):
            start = time.process_time()
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs, ignored_params=[])
            seconds["graph"].append(time.process_time() - start)
            list(graph.get_all_groups(root_module_types=[torch.nn.Linear]))
            seconds["graph and groups"].append(time.process_time() - start)
            start = time.process_time()
            discover(model)
            seconds["discovery"].append(time.process_time() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        version = importlib.metadata.version("torch-pruning")
        print(
            f"\nA 32-layer multi-head Llama of hidden size 1024, CPU seconds, median of {args.rounds}: discovery ",
            end="",
        )
        print(
            f"(groups included) {medians['discovery']:.2f}; Torch-Pruning {version}'s graph {medians['graph']:.2f} ",
            end="",
        )
        print(f"({medians['graph'] / medians['discovery']:.1f} x), its graph and groups ", end="")
        print(f"{medians['graph and groups']:.2f} ({medians['graph and groups'] / medians['discovery']:.1f} x).")
    print(f"\n{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()

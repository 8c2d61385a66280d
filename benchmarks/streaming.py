"""Peak memory of `pyprune prune --stream` on a random Llama in bfloat16.

    python benchmarks/streaming.py --scratch /somewhere/with/room [--parameters 2B]

Writes the model into the scratch folder in shards, prunes it from disk in a process of its own, prints that process's
largest resident size (mapped files count) and the time, and deletes everything again. The bound is a quarter of the
model's bytes and 1 GiB; the exit status says whether it was kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {  # hidden size, FFN channels, layers, query heads, KV heads
    "2B": (2048, 8192, 32, 32, 8),
    "0.5B": (1024, 4096, 32, 16, 4),
    "50M": (512, 1536, 12, 8, 4),
}
VOCABULARY = 32_000
SHARD = "1GB"


def write_model(folder: Path, size: str) -> None:
    """A random Llama, a shard in memory at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    torch.manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            values = torch.empty(state[name].shape, dtype=torch.bfloat16)
            tensors[name] = values.fill_(1.0) if values.dim() == 1 else values.normal_(0, 0.02)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(folder: Path, output: Path, ids: Path, arguments: argparse.Namespace) -> tuple[int, int, float]:
    """(exit status, peak resident bytes, seconds) of the pruning process."""
    command = [sys.executable, "-m", "pyprune", "prune", str(folder), "--stream", "--ratio", "0.2", "--device", "cpu"]
    command += ["--criterion", arguments.criterion, "--output_dir", str(output), "--quiet", "--max_shard_size", SHARD]
    if arguments.criterion not in ("l1", "l2", "random"):
        command += ["--calibration", str(ids)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": path})
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the model and the result")
    parser.add_argument("--parameters", choices=list(SIZES), default="2B")
    parser.add_argument("--criterion", default="param_first")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    import numpy as np

    work = Path(tempfile.mkdtemp(prefix="pyprune-streaming-", dir=arguments.scratch))
    try:
        # In a process of its own: a child's high-water mark begins at its parent's size, which must stay small.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(work / "model", arguments.parameters)
        )
        writer.start()
        writer.join()
        size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
        ids = work / "ids.npy"
        shape = (arguments.samples, arguments.length)
        np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY, shape))
        status, peak, seconds = prune(work / "model", work / "smaller", ids, arguments)
        after = sum(f.stat().st_size for f in (work / "smaller").glob("*.safetensors"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    bound = size // 4 + 2**30
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"machine            {machine}")
    print(f"model              {arguments.parameters} Llama, bfloat16, {size / 2**20:,.0f} MiB")
    print(f"scored by          {arguments.criterion}, {arguments.samples} x {arguments.length} tokens")
    print(f"result             {after / 2**20:,.0f} MiB, exit status {status}")
    print(f"peak resident      {peak / 2**20:,.0f} MiB ({peak / size:.1%} of the model)")
    print(f"bound              {bound / 2**20:,.0f} MiB (25% of the model + 1 GiB)")
    print(f"time               {seconds:,.1f} s")
    return 0 if status == 0 and peak <= bound else 1


if __name__ == "__main__":
    sys.exit(main())

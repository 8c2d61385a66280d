"""Profile ``hetero-decilm``: per-layer FFN widths and KV heads as ``DeciLMForCausalLM`` has them (``block_configs``).

vLLM and TensorRT-LLM serve that class, and llama.cpp's converter reads it. They compute

    KV heads = attention heads // n_heads_in_group
    FFN      = int(2 * ffn_mult * hidden / 3), up to the next multiple of 256

so every layer has all query heads, and FFN widths are multiples of 256. A layer without attention or without an FFN is
marked ``no_op``; it has no norm in front of what is gone either.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyprune.checkpoint.profiles.blocks import Block, llama_blocks
from pyprune.checkpoint.profiles.configuration import edit_config
from pyprune.checkpoint.profiles.weights import drop_tensors
from pyprune.errors import PyPruneError
from pyprune.surgery import skip

NAME = "hetero-decilm"
STEP = 256
MODEL_TYPE = "nemotron-nas"
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""What a layer may be without -> the norm that goes with it."""
ROLES: tuple[str, ...] | None = ("ffn", "layers")
ROUND_TO: dict[str, int] = {"ffn": STEP}
EVEN = False
OPENING = (
    "Its layers have different widths, written as `block_configs` of `DeciLMForCausalLM`, which vLLM and TensorRT-LLM "
    "serve (`--trust-remote-code`: the configuration class lies in this folder). Plain transformers opens it too:\n\n"
    "```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)\n```'
)


def check(outline: Any) -> None:
    """Raises PyPruneError, with the nearest widths that fit, when ``block_configs`` cannot describe the model."""
    block_configs(outline)


def write(work: Path, outline: Any) -> None:
    """Turns the folder of a saved model into one of DeciLM."""
    blocks = llama_blocks(outline, NAME, tuple(NORMS))
    described = block_configs(outline)
    gone = [path.rpartition(".") for path in skip.spec_of(outline.config)]
    drop_tensors(work, [f"{layer}.{NORMS[part]}.weight" for layer, _, part in gone])
    for file in ("configuration_decilm.py", "modeling_decilm.py"):
        shutil.copyfile(Path(__file__).parent / "files" / file, work / file)
    config = outline.config
    edit_config(
        work,
        {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": MODEL_TYPE,
            "auto_map": {
                "AutoConfig": "configuration_decilm.DeciLMConfig",
                "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
            },
            "block_configs": described,
            "num_attention_heads": max(block.query_heads for block in blocks),
            "head_dim": blocks[0].head_dim,
            "intermediate_size": max(block.ffn for block in blocks),
            "num_key_value_heads": None,
            "per_layer_config": None,
            skip.FIELD: None,
            "allow_global_per_layer_attribute_access": None,
            "sliding_window": None,
            "attention_bias": bool(getattr(config, "attention_bias", False)),
            "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        },
    )


def block_configs(outline: Any) -> list[dict[str, Any]]:
    """``block_configs`` of a Llama or Mistral model.

    Raises:
        PyPruneError: a layer lacks query heads, or has an FFN width that is no multiple of 256.
    """
    blocks, hidden = llama_blocks(outline, NAME, tuple(NORMS)), outline.config.hidden_size
    if getattr(outline.config, "sliding_window", None) is not None:
        raise PyPruneError("profile", NAME, "has no sliding window, and the model has one", "Use hetero-hf.")
    _check_heads(blocks, hidden)
    for index, block in enumerate(blocks):
        if block.ffn % STEP:
            below, above = block.ffn // STEP * STEP, -(-block.ffn // STEP) * STEP
            near = " or ".join(str(n) for n in (below, above) if n)
            problem = f"holds FFN widths that are multiples of {STEP}, and layer {index} has {block.ffn}"
            hint = f"The nearest is {near}: pyprune prune --profile {NAME} keeps to it, or use hetero-hf."
            raise PyPruneError("profile", NAME, problem, hint)
    return [
        {
            "attention": {
                "n_heads_in_group": block.query_heads // block.kv_heads if block.kv_heads else None,
                "no_op": not block.kv_heads,
                "replace_with_linear": False,
            },
            "ffn": {
                "ffn_mult": ffn_mult(block.ffn, hidden) if block.ffn else None,
                "no_op": not block.ffn,
                "replace_with_linear": False,
            },
        }
        for block in blocks
    ]


def ffn_mult(width: int, hidden: int) -> float:
    """The multiplier, ``3 * width / (2 * hidden)``, that readers turn back into ``width``, a multiple of 256.

    A rounding error makes their ``int`` one too small at most, and the next multiple of 256 is ``width`` all the same.
    """
    multiplier = 3 * width / (2 * hidden)
    if intermediate_size(multiplier, hidden) != width:
        raise PyPruneError("profile", NAME, f"has no ffn_mult for {width} FFN channels at hidden size {hidden}")
    return multiplier


def intermediate_size(multiplier: float, hidden: int) -> int:
    """FFN channels that readers make of a multiplier."""
    return -(-int(2 * multiplier * hidden / 3) // STEP) * STEP


def _check_heads(blocks: Sequence[Block], hidden: int) -> None:
    most = max(block.query_heads for block in blocks)
    for index, block in enumerate(blocks):
        if not block.kv_heads:
            continue
        if block.query_heads != most:
            problem = f"keeps all query heads, and layer {index} has {block.query_heads} where others have {most}"
            raise PyPruneError(
                "profile", NAME, problem, f"The nearest plan is {most} query heads in every layer, or use gguf."
            )
        if block.query_heads % block.kv_heads:
            problem = f"wants whole groups, and layer {index} has {most} query heads on {block.kv_heads} KV heads"
            raise PyPruneError("profile", NAME, problem, "Use hetero-hf.")
    if hidden % most:
        fitting = [n for n in range(1, most + 1) if hidden % n == 0]
        problem = f"needs a number of query heads that divides the hidden size {hidden}, and there are {most}"
        raise PyPruneError("profile", NAME, problem, f"The nearest that fits is {fitting[-1]}, or use gguf.")

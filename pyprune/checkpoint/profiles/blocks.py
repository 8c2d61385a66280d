"""Widths of a Llama-shaped model, layer by layer: what the formats of other programs describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyprune.checkpoint.profiles.source import OWN_CODE, is_transformers_own
from pyprune.errors import PyPruneError
from pyprune.surgery import narrow, resize, skip
from pyprune.surgery.decoder import structure

SUPPORTED = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclass(frozen=True)
class Block:
    """One decoder layer: numbers of query heads and KV heads (none without attention), width of a head, FFN channels
    (none without an FFN)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    ffn: int


def llama_blocks(outline: Any, profile: str, gaps: Sequence[str] = ()) -> list[Block]:
    """The decoder layers of a Llama or Mistral model.

    Args:
        gaps: what a layer may be without: ``self_attn``, ``mlp``.

    Raises:
        PyPruneError: it is of another class, does not use SiLU, has matrices that no head count describes, or lacks
            something else.
    """
    config = outline.config
    cls = type(outline).__name__
    if SUPPORTED.get(config.model_type) != cls:
        other = "Use hetero-hf, or uniform." if is_transformers_own(outline) else OWN_CODE
        hint = f"It holds {' and '.join(SUPPORTED.values())}. {other}"
        raise PyPruneError("profile", profile, f"cannot hold a {cls}", hint)
    if config.hidden_act not in ("silu", "swish"):
        raise PyPruneError("profile", profile, f"has SiLU in its FFN, and the model {config.hidden_act}")
    gone = skip.spec_of(config)
    missed = [path for path in gone if path.rpartition(".")[2] not in gaps]
    if missed:
        problem = f"is written for layers with {'attention and FFN' if not gaps else 'an FFN'}, and {missed[0]} is gone"
        raise PyPruneError("profile", profile, problem, "Remove whole layers (layer_part layer), or use hetero-hf.")
    for spec, what in ((narrow.spec_of(config), "narrow layers"), (resize.spec_of(config), "resized modules")):
        if spec:
            hint = "Prune kv_heads, query_heads, ffn, hidden or layers, or use hetero-hf."
            raise PyPruneError("profile", profile, f"has no {what}, as {next(iter(spec))} is one", hint)
    shapes = structure(outline)
    out = []
    for index, layer in enumerate(outline.model.layers):
        at, width = f"model.layers.{index}", layer.self_attn.head_dim
        rows = {name: shapes.get(f"{at}.self_attn.{name}_proj.weight", (0,))[0] for name in "qk"}
        ffn = shapes.get(f"{at}.mlp.up_proj.weight", (0,))[0]
        out.append(Block(rows["q"] // width, rows["k"] // width, width, ffn))
    if len({block.head_dim for block in out}) > 1:
        raise PyPruneError("profile", profile, "has one head width for all layers", "Use hetero-hf.")
    return out


def is_uniform(blocks: Sequence[Block]) -> bool:
    """Whether all layers are alike."""
    return len(set(blocks)) <= 1

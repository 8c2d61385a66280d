"""Profile ``uniform``: the same widths in every layer, so that every program that reads the stock class opens it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pyprune import families
from pyprune.checkpoint.profiles.configuration import edit_config
from pyprune.checkpoint.profiles.source import OWN_CODE, is_transformers_own
from pyprune.errors import PyPruneError
from pyprune.surgery import narrow, resize, skip
from pyprune.surgery.attributes import read
from pyprune.surgery.decoder import layer_overrides, layers_path, structure, text_config

ROLES: tuple[str, ...] | None = None
ROUND_TO: dict[str, int] = {}
EVEN = True
OPENING = (
    "Every layer has the same widths, so plain transformers opens it, and so do vLLM, TensorRT-LLM and llama.cpp's "
    "converter where they know the class.\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```'
)
_ROLES = {"intermediate_size": "ffn", "num_key_value_heads": "kv_heads", "moe_intermediate_size": "expert_ffn"}


def check(outline: Any) -> None:
    """Raises PyPruneError, with the nearest widths that fit, unless the stock class builds the model."""
    if not is_transformers_own(outline) and _differ(outline):  # as only its code says
        problem = f"has the same widths in every layer, and the layers of {type(outline).__name__} differ"
        raise PyPruneError("profile", "uniform", problem, OWN_CODE)
    text = text_config(outline.config)
    overrides = layer_overrides(text)
    if overrides:
        raise PyPruneError("profile", "uniform", *_uneven(text, overrides))
    hint = "Prune kv_heads, query_heads, ffn, hidden or layers, or use hetero-hf."
    for kind, what in ((narrow, "narrow"), (resize, "resized"), (skip, "gone")):
        if spec := kind.spec_of(outline.config):
            problem = f"holds what the stock class builds, and {next(iter(spec))} is {what}"
            raise PyPruneError("profile", "uniform", problem, hint)
    family = families.find(text)
    if family is not None and family.applies(text):
        names = ", ".join(n for n in family.explicit if getattr(text, n, None) is not None)
        problem = f"holds what the stock class builds, and {type(outline).__name__} has no {names}"
        raise PyPruneError("profile", "uniform", problem, "Keep the heads whole, or use hetero-hf.")


def write(work: Path, outline: Any) -> None:
    """Writes the width of a head out, which readers would else take for hidden size / heads."""
    check(outline)
    config = outline.config
    width = getattr(config, "head_dim", None)
    computed = isinstance(getattr(type(config), "head_dim", None), property)  # Falcon's, which cannot be set
    if isinstance(width, int) and not computed:
        edit_config(work, {"head_dim": width})


def _differ(outline: Any) -> bool:
    path = layers_path(outline)
    layers = [structure(layer) for layer in outline.get_submodule(path)] if path is not None else []
    return any(layer != layers[0] for layer in layers)


def _uneven(text: Any, overrides: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """(problem, hint) for layers that differ, or that only per-layer values describe."""
    count = text.num_hidden_layers
    values: dict[str, list[Any]] = {}
    for name in dict.fromkeys(n for own in overrides.values() for n in own):
        values[name] = [overrides.get(i, {}).get(name, read(text, name)) for i in range(count)]
    uneven = {name: found for name, found in values.items() if len(set(found)) > 1}
    if not uneven:
        heads, hidden = values.get("num_attention_heads", [None])[0], read(text, "hidden_size")
        if heads is None:
            return "holds what the stock configuration describes, and this one it refuses", "Use hetero-hf."
        fitting = [n for n in range(1, hidden + 1) if hidden % n == 0]
        near = sorted({max((n for n in fitting if n < heads), default=1), min(n for n in fitting if n >= heads)})
        return (
            f"needs a number of heads that divides the hidden size {hidden}, and there are {heads}",
            f"The nearest are {' and '.join(map(str, near))}: prune again to one of them, or use hetero-hf.",
        )
    name = next((n for n in _ROLES if n in uneven), next(iter(uneven)))
    found = uneven[name]
    low, high = min(found), max(found)
    problem = (
        f"wants one {name} in all layers, and it is {found[found.index(low)]} in layer {found.index(low)}, "
        f"{high} in layer {found.index(high)}"
    )
    widths = ",".join(f"{_ROLES[n]}={_nearest(v)}" for n, v in uneven.items() if n in _ROLES)
    again = f"The nearest plan is --widths {widths} from the dense model" if widths else "Prune again evenly"
    return problem, f"{again} (pyprune prune --profile uniform), or use hetero-hf."


def _nearest(values: list[int]) -> int:
    """The width of the layers' own that is nearest to their mean, the commoner of two."""
    mean = sum(values) / len(values)
    common = Counter(values)
    return min(common, key=lambda v: (abs(v - mean), -common[v]))

"""Profile ``gguf``: one file for llama.cpp. Uniform widths as architecture ``llama``, per-layer ones as ``deci``.

``deci`` (llama.cpp's name for DeciLM) reads heads, KV heads and FFN width of every layer from arrays, so any widths
fit that share one head width. Weights are written one at a time; the whole model is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint.profiles.blocks import Block, is_uniform, llama_blocks
from pyprune.checkpoint.profiles.source import Source
from pyprune.checkpoint.profiles.vocabulary import add_vocabulary
from pyprune.checkpoint.profiles.weights import in_type
from pyprune.errors import PyPruneError
from pyprune.progress import track

NAME = "gguf"
ROLES: tuple[str, ...] | None = ("kv_heads", "query_heads", "ffn", "hidden", "layers")
ROUND_TO: dict[str, int] = {}
EVEN = False
_ROPES = ("default", "linear", "llama3")
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check(outline: Any) -> None:
    """Raises PyPruneError when llama.cpp has no architecture for the model."""
    llama_blocks(outline, NAME)
    rope = outline.config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES:
        raise PyPruneError("profile", NAME, f"is written with {', '.join(_ROPES)} rotary embeddings, not {kind}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PyPruneError("profile", NAME, "rotates whole heads, and the model parts of them")


def check_tokenizer(tokenizer: Any, size: int) -> None:
    """Raises PyPruneError when llama.cpp has no counterpart of a tokenizer for ``size`` embeddings."""
    import gguf

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        add_vocabulary(gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]), Path(folder), size)


def write(source: Source, file: Path, dtype: torch.dtype, vocabulary: Path | None) -> None:
    """Writes the model to ``file``.

    Args:
        dtype: of the matrices: float32, float16 or bfloat16. Norms and biases are float32 always, as llama.cpp wants.
        vocabulary: folder of the tokenizer; None writes a model without one, which takes token ids only.

    Raises:
        PyPruneError: the model or its tokenizer has no counterpart in llama.cpp, or a weight is missing.
    """
    import gguf

    check(source.outline)
    blocks = llama_blocks(source.outline, NAME)
    arch = gguf.MODEL_ARCH.LLAMA if is_uniform(blocks) else gguf.MODEL_ARCH.DECI
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _add_numbers(writer, source.config, blocks, _TYPES[dtype])
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        add_vocabulary(writer, vocabulary, source.config.vocab_size)
    names = gguf.get_tensor_name_map(arch, len(blocks))
    factors = _rope_factors(source.config, blocks[0].head_dim)
    if factors is not None:
        _announce(writer, gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", factors.shape, torch.float32)
    planned = list(_weights(source.outline))
    for name, shape in planned:
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise PyPruneError("profile", NAME, f"llama.cpp has no tensor for {name}", "Use hetero-hf.")
        _announce(writer, target, shape, dtype if len(shape) > 1 else torch.float32)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for name, shape in track(planned, "write gguf"):
            value = _permuted(name, _read(source, name, shape), blocks)
            value = in_type(name, value, dtype if len(shape) > 1 else torch.float32)
            writer.write_tensor_data(_raw(value))
    finally:
        writer.close()


def _add_numbers(writer: Any, config: Any, blocks: list[Block], kind: str) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    name = str(getattr(config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    writer.add_name(f"{name or type(config).__name__.removesuffix('Config')}, pruned")
    uniform = is_uniform(blocks)

    def common(values: list[int]) -> Any:
        return values[0] if uniform else values

    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    writer.add_context_length(context if window is None else min(context, window))  # llama.cpp has no window here
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(blocks))
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(common([b.query_heads for b in blocks]))
    writer.add_head_count_kv(common([b.kv_heads for b in blocks]))
    writer.add_feed_forward_length(common([b.ffn for b in blocks]))
    writer.add_key_length(blocks[0].head_dim)
    writer.add_value_length(blocks[0].head_dim)
    writer.add_rope_dimension_count(blocks[0].head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                          "BF16": gguf.LlamaFileType.MOSTLY_BF16}[kind])  # fmt: skip


def _weights(outline: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter; a tied output head is left to the reader, which takes the embeddings."""
    for name, parameter in outline.named_parameters():
        yield name, tuple(parameter.shape)


def _read(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    value = source.tensor(name)
    if tuple(value.shape) != shape:
        problem = f"has {name} of shape {list(value.shape)}, and its configuration says {list(shape)}"
        raise PyPruneError("model_name_or_path", source.name, problem)
    return value


def _permuted(name: str, value: Tensor, blocks: list[Block]) -> Tensor:
    """llama.cpp rotates neighbours (0, 1), (2, 3), ...; transformers rotates halves (0, d/2), (1, d/2 + 1), ....

    So the rows of a query or key head, [2, d/2], go to [d/2, 2].
    """
    parts = name.split(".")
    if len(parts) < 2 or parts[-2] not in ("q_proj", "k_proj"):
        return value
    width = blocks[int(parts[2])].head_dim
    return value.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).reshape(value.shape)


def _rope_factors(config: Any, width: int) -> Tensor | None:
    """float32 [width / 2]: what llama.cpp divides rotary frequencies by; None where they are plain.

    Transformers has the frequencies themselves (``llama3`` scaling), so the factors are plain over scaled.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    length = 2 * math.pi / plain
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((original / length - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1 - smooth) / factor + smooth)).to(torch.float32)


def _announce(writer: Any, name: str, shape: Any, dtype: torch.dtype) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    size = math.prod(shape) * dtype.itemsize
    writer.add_tensor_info(name, tuple(shape), np.dtype(np.float32), size, raw_dtype=kind)


def _raw(value: Tensor) -> Any:
    """The bytes of a weight, as a NumPy array; NumPy has no bfloat16."""
    value = value.cpu().contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()

"""Models read from a GGUF file: full-precision weights under a quantised model's marks."""

from __future__ import annotations

from typing import Any


def is_from_gguf(model: Any) -> bool:
    """Whether ``model`` was read from a GGUF file and its weights are plain floating-point numbers."""
    marked = "gguf" in type(getattr(model, "hf_quantizer", None)).__name__.lower()
    return marked and all(p.is_floating_point() for p in model.parameters())


def drop_config_marks(config: Any) -> None:
    """Removes what says that weights are quantised from a configuration, in place."""
    for name in ("quantization_config", "_is_quantized"):
        config.__dict__.pop(name, None)


def drop_marks(model: Any) -> bool:
    """Removes the marks from ``model``, in place; they forbid saving. True when there were any."""
    if not is_from_gguf(model):
        return False
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    drop_config_marks(model.config)
    return True

"""A number that stands for what a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "dtype")
"""Of a configuration: they say nothing of results."""


def fingerprint(values: Any) -> str:
    """SHA-256 of nested mappings, sequences, tensors and plain values, in hexadecimal."""
    digest = hashlib.sha256()
    _feed(digest, values)
    return digest.hexdigest()


def fingerprint_of_model(model: nn.Module) -> str:
    """SHA-256 of a model (:func:`fingerprint_of_weights`) and the device that it computes on."""
    return fingerprint([fingerprint_of_weights(model), next(model.parameters()).device.type])


def fingerprint_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's class, configuration, and every parameter and buffer, wherever they are.

    Where the model lies and which transformers wrote it are left out of the configuration.
    """
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    given: dict[str, Any] = to_dict()
    config = json.dumps({k: v for k, v in given.items() if k not in _NAMES}, sort_keys=True, default=str)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return fingerprint([type(model).__name__, config, tensors])


def _feed(digest: Any, value: Any) -> None:
    """What is fed says where each value ends, so that no two that differ feed the same bytes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{list(flat.shape)};".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"{{{len(value)};".encode())
        for key in sorted(value):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        digest.update(f"[{len(value)};".encode())
        for item in value:
            _feed(digest, item)
    else:
        plain = repr(value)
        digest.update(f"{len(plain)}:{plain};".encode())

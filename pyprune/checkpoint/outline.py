"""A model without its weights: what inspecting needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyprune.checkpoint.files import OPTION, read_config
from pyprune.checkpoint.load import looks_like_a_path, model_class, open_config
from pyprune.checkpoint.quiet import quiet
from pyprune.errors import PyPruneError
from pyprune.surgery import skeleton


def open_outline(model_name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """The model of a folder or hub name, tensors on the meta device; only its configuration is read.

    Raises:
        PyPruneError: there is no such model, or it is no causal language model that can be pruned.
    """
    path = Path(model_name_or_path).expanduser()
    name = str(path)
    if path.is_dir():
        read_config(path)
    elif path.exists() or looks_like_a_path(name):
        hint = "Make one of a GGUF file: `pyprune export FILE.gguf --output FOLDER`." if path.suffix == ".gguf" else ""
        raise PyPruneError(OPTION, name, "is not a folder" if path.exists() else "does not exist", hint)
    with quiet():
        config = open_config(name, trust_remote_code)
        model = skeleton.build(model_class(config, name, trust_remote_code), config)
    model.tie_weights()
    return model.eval()

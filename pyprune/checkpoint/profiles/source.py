"""What is exported: a checkpoint folder, read tensor by tensor, or a model in memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pyprune.checkpoint.files import OPTION, check_folder, read_config, weight_files
from pyprune.checkpoint.load import check_config, model_class, open_config, open_model
from pyprune.errors import PyPruneError
from pyprune.importance.modes import check_weights
from pyprune.surgery import skeleton
from pyprune.surgery.apply import bare

OWN_CODE = (
    "Models with code of their own are opened with it, or by pyprune.load; of a folder that an export made, export the "
    "one that it was made from."
)
"""Hint where :func:`is_transformers_own` says no."""


def is_transformers_own(model: Any) -> bool:
    """Whether a model's class is one of transformers, and not of code that came with the checkpoint."""
    return type(model).__module__.startswith("transformers.")


@dataclass
class Source:
    """A causal language model and where its weights are.

    Attributes:
        name: of the folder, hub model or class, for messages.
        outline: the model with its tensors on the meta device.
        folder: the checkpoint folder, or None for a model in memory.
        model: the model in memory, or None.
        tokenizer: of a model in memory; None without one. A folder's lies in the folder.
    """

    name: str
    outline: Any
    folder: Path | None = None
    model: Any = None
    tokenizer: Any = None
    _files: dict[str, Path] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.outline.config

    def tensor(self, name: str) -> Tensor:
        """One weight by its parameter's name; of a folder it is read from the memory-mapped file now.

        Raises:
            PyPruneError: the folder does not have it.
        """
        if self.model is not None:
            return self.model.get_parameter(name).detach()
        file = self._index().get(name)
        if file is None:
            raise PyPruneError(OPTION, self.name, f"lacks the weight {name}", "Download the checkpoint again.")
        if file not in self._open:
            self._open = {file: safe_open(file, "pt")}  # one mapping at a time: pages of the others can go
        return self._open[file].get_tensor(name)

    def _index(self) -> dict[str, Path]:
        if not self._files and self.folder is not None:
            for file in weight_files(self.folder):
                with safe_open(file, "pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
        return self._files


def open_source(model: Any, tokenizer: Any = None, trust_remote_code: bool = False) -> Source:
    """The source for a folder, a hub name, a GGUF file or a model in memory.

    Of a local folder only the configuration is read here.

    Raises:
        PyPruneError: there is no such model, or it is no complete causal language model.
    """
    if not isinstance(model, (str, Path)):
        return of_model(model, tokenizer)
    path = Path(model).expanduser()
    if not path.is_dir():
        opened, own = open_model(model, trust_remote_code=trust_remote_code)
        return of_model(opened, own if tokenizer is None else tokenizer)
    check_folder(path)
    check_config(read_config(path), str(path), trust_remote_code)
    config = open_config(str(path), trust_remote_code=trust_remote_code)
    cls = model_class(config, str(path), trust_remote_code)
    return Source(str(path), _outline(cls, config), folder=path, tokenizer=tokenizer)


def of_model(model: Any, tokenizer: Any = None) -> Source:
    """The source for a model in memory.

    Raises:
        PyPruneError: it is not a transformers model, carries an adapter, or its weights are not in memory.
    """
    model = bare(model)
    check_weights(model)
    return Source(type(model).__name__, _outline(type(model), model.config), model=model, tokenizer=tokenizer)


def _outline(cls: Any, config: Any) -> Any:
    model = skeleton.build(cls, copy.deepcopy(config))
    model.tie_weights()
    return model

"""Profile ``hetero-hf``: any widths, opened by plain transformers with the modelling file in the folder.

The file (``files/modeling_pyprune.py``, copied as it stands) runs the stock constructor and then gives modules the
widths of ``per_layer_config`` and of the record ``pyprune_build`` in ``config.json``. The record is found here by
comparison: whatever the file's model, built from ``per_layer_config`` alone, lacks in shapes and numbers.
"""

from __future__ import annotations

import copy
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from pyprune import families
from pyprune.checkpoint.load import BUILD
from pyprune.checkpoint.profiles.configuration import edit_config
from pyprune.checkpoint.profiles.source import OWN_CODE, is_transformers_own
from pyprune.errors import PyPruneError
from pyprune.surgery import narrow, skeleton
from pyprune.surgery.decoder import layer_overrides, layers_path, on_meta, scalars, structure, text_config

FILE = "modeling_pyprune"
ROLES: tuple[str, ...] | None = None
ROUND_TO: dict[str, int] = {}
EVEN = False
OPENING = (
    "Its layers have widths of their own; the small modelling file in this folder builds them. It needs torch and "
    "transformers only:\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)\n```\n\n'
    'Or, without running that file: `pyprune.load("path/to/this/folder")`.'
)


def check(outline: Any) -> None:
    """Raises PyPruneError when the modelling file cannot build the model."""
    build_record(outline)


def write(work: Path, outline: Any) -> None:
    """Puts the modelling file, and what it reads, into the folder of a saved model."""
    record = build_record(outline)
    shutil.copyfile(Path(__file__).parent / "files" / f"{FILE}.py", work / f"{FILE}.py")
    auto_map = {"AutoModelForCausalLM": f"{FILE}.{type(outline).__name__}"}
    edit_config(work, {"auto_map": auto_map, BUILD: record})


def build_record(outline: Any) -> dict[str, Any]:
    """The value of ``pyprune_build`` for a model (see the modelling file), checked by building with it.

    Raises:
        PyPruneError: the model's class is none of transformers', or the file's model would differ from it.
    """
    cls: Any = type(outline)
    if not is_transformers_own(outline):
        raise PyPruneError("profile", "hetero-hf", f"{cls.__name__} is no class of transformers", OWN_CODE)
    path = layers_path(outline) if layer_overrides(text_config(outline.config)) else None
    problem = ""
    for layers in dict.fromkeys((path, None)):
        try:
            record = _found(outline, layers)
            problem = _difference(_built(cls, outline.config, record), outline)
        except Exception as error:  # a layer's constructor may want more than its configuration and index
            problem = str(error)
        if not problem:
            return record
    raise PyPruneError("profile", "hetero-hf", f"cannot describe this {cls.__name__} ({problem})", "Use pyprune.load.")


def _found(outline: Any, layers: str | None) -> dict[str, Any]:
    text = text_config(outline.config)
    plain = text_config(skeleton.stock_config(outline.config))
    same = ("_heterogeneity_spec", "allow_global_per_layer_attribute_access")
    stock = {n: v for n, v in vars(plain).items() if n not in same and vars(text).get(n) != v}
    record: dict[str, Any] = {"stock": stock, "layers": layers, "modules": {}, "tables": _tables(outline)}
    config = copy.copy(outline.config)
    config.__dict__.pop(narrow.FIELD, None)
    wanted = skeleton.build(type(outline), config)
    made = _built(type(outline), config, record)
    modules = record["modules"]
    shapes = structure(made)
    for name, parameter in wanted.named_parameters(remove_duplicate=False):
        if shapes.get(name) != tuple(parameter.shape):
            module, _, last = name.rpartition(".")
            modules.setdefault(module, {})[last] = list(parameter.shape)
    numbers = scalars(made)
    for name, value in scalars(wanted).items():
        if numbers.get(name) != value:
            module, _, last = name.rpartition(".")
            modules.setdefault(module, {})[last] = value
    return record


def _tables(outline: Any) -> dict[str, list[Any]]:
    out = {}
    for path, module in outline.named_modules():
        kept = module._buffers.get(families.KEPT)
        if kept is not None:
            argument, position, batched = module.table_rows
            out[path] = [argument, position, len(kept), batched]
    return out


def _built(cls: Any, config: Any, record: dict[str, Any]) -> Any:
    """What the modelling file makes of a configuration with this record, on the meta device."""
    made = copy.copy(config)
    setattr(made, BUILD, record)
    file = import_module(f"{__package__}.files.{FILE}")
    return on_meta(lambda: file.pruned_class(cls)._from_config(made, dtype=made.dtype))


def _difference(made: Any, wanted: Any) -> str:
    """What the model ``made`` has otherwise than ``wanted``, in tensors and numbers; "" when nothing."""
    for one, other in ((structure(made), structure(wanted)), (scalars(made), scalars(wanted))):
        for name in other:
            if one.get(name) != other[name]:
                return f"{name} would be {one.get(name)}, not {other[name]}"
    return next((f"{name} would be there" for name in structure(made).keys() - structure(wanted).keys()), "")

"""Opening checkpoints: stock folders, pruned folders with per-layer widths, names on a hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pyprune.checkpoint.files import OPTION, check_folder, read_config
from pyprune.checkpoint.quiet import quiet
from pyprune.errors import PyPruneError
from pyprune.surgery import skeleton

BUILD = "pyprune_build"
"""Field of ``config.json`` for the modelling file that lies beside some checkpoints."""

UNEVEN = "deci"
"""GGUF's architecture for Llama-shaped models whose layers have widths of their own."""

_REFUSALS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""What opening a damaged checkpoint raises: model classes take the values of a configuration as they are."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The causal language model in a local folder, in evaluation mode.

    Opens what stock transformers opens, and what :func:`pyprune.save` writes, per-layer widths and families with an
    adapter included. Built on the meta device and filled from the memory-mapped safetensors, so that the model is in
    memory once.

    Args:
        dtype: of the weights; None or ``"auto"`` keeps the checkpoint's.
        device: where the weights go; None is the CPU.
        trust_remote_code: run modelling code that comes with the folder.

    Raises:
        PyPruneError: the folder is missing or incomplete, holds no causal language model, quantised weights, weights in
            a pickle only, weights that are not finite, or code that ``trust_remote_code`` does not allow.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise PyPruneError("folder", str(folder), "is not a folder")
    try:
        return _from_folder(path, dtype, device, trust_remote_code)
    except PyPruneError as error:
        option = "folder" if error.option == OPTION else error.option
        raise PyPruneError(option, error.value, error.problem, error.hint) from error.__cause__


def open_model(
    model_name_or_path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
    trust_remote_code: bool = False, revision: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer) from a local folder, a GGUF file or a name on the hub; the tokenizer is None without one.

    Arguments and errors are those of :func:`load`; a GGUF file's weights are taken out of their quantisation.

    Args:
        revision: branch, tag or commit of a model on the hub.
    """
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
        return _from_folder(path, dtype, device, trust_remote_code), open_tokenizer(str(path), trust_remote_code, path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, dtype, device, trust_remote_code)
    name = str(model_name_or_path)
    if path.exists() or looks_like_a_path(name):
        raise PyPruneError(OPTION, name, "is not a folder with a checkpoint" if path.exists() else "does not exist")
    where = {} if revision is None else {"revision": revision}
    model = _from_pretrained(name, dtype, device, trust_remote_code, **where)
    return model, open_tokenizer(name, trust_remote_code, None, **where)


def _from_folder(path: Path, dtype: Any, device: Any, trust_remote_code: bool) -> Any:
    check_folder(path)
    check_config(read_config(path), str(path), trust_remote_code)
    return _from_pretrained(str(path), dtype, device, trust_remote_code)


def _from_gguf(path: Path, dtype: Any, device: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """Transformers take a folder and a name in it; messages name the file."""
    folder, options = str(path.parent), {"gguf_file": path.name}
    try:
        model = _from_pretrained(folder, dtype, device, trust_remote_code, **options)
        return model, open_tokenizer(folder, trust_remote_code, None, **options)
    except PyPruneError as error:
        problem, hint = error.problem, error.hint
        if f"model type `{UNEVEN}`" in str(error.__cause__):
            problem = f"has layers of different widths (architecture {UNEVEN}), which only llama.cpp opens"
            hint = "Name the folder that it was made from; pruning with another profile than gguf leaves one."
        raise PyPruneError(error.option, str(path), problem, hint) from error.__cause__


def looks_like_a_path(name: str) -> bool:
    """A hub name is ``model`` or ``owner/model``."""
    return (
        os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")
    )


def _from_pretrained(name: str, dtype: Any, device: Any, trust_remote_code: bool, **options: Any) -> Any:
    with quiet():
        config = open_config(name, trust_remote_code, **options)
        cls = model_class(config, name, trust_remote_code, options.get("revision"))
        wanted = skeleton.loading_class(cls)
        target = {} if device is None else {"device_map": {"": device}}
        dtype = "auto" if dtype is None else dtype
        try:
            model, info = wanted.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **target, **options
            )
        except _REFUSALS as error:
            raise reworded(error, name) from error
    model.__class__ = cls
    _check_complete(info, model, name)
    check_finite(model, name)
    return model


def open_config(name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """The configuration of a folder or hub name, checked.

    What says how plain transformers builds the same model (:mod:`pyprune.checkpoint.profiles.hetero_hf`) is left out:
    here the configuration's widths are enough, and it would be wrong after the next cut.

    Raises:
        PyPruneError: there is none, or it is of nothing that can be opened here.
    """
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        except Exception as error:  # configuration classes refuse values with any exception
            raise reworded(error, name) from error
        check_config(config.to_dict(), name, trust_remote_code)
    if config.__dict__.pop(BUILD, None) is not None:
        config.__dict__.pop("auto_map", None)
    return config


def check_config(config: dict[str, Any], name: str, trust_remote_code: bool) -> None:
    quantization = config.get("quantization_config")
    if quantization and "gguf" not in str(quantization):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise PyPruneError(
            OPTION,
            name,
            f"has quantised weights ({method}), which cannot be pruned",
            "Name the full-precision checkpoint.",
        )
    from transformers import CONFIG_MAPPING

    remote = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
    if remote and not trust_remote_code:
        raise _needs_code(name)


def _needs_code(name: str) -> PyPruneError:
    hint = "Read the code, then allow it with trust_remote_code."
    return PyPruneError(OPTION, name, "needs modelling code that comes with it", hint)


def model_class(config: Any, name: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The causal language model class for a configuration; code that comes with the model is that of ``revision``."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in remote:
        try:
            own: Any = get_class_from_dynamic_module(remote["AutoModelForCausalLM"], name, revision=revision)
        except Exception as error:  # somebody else's code
            raise reworded(error, name) from error
        own.register_for_auto_class("AutoModelForCausalLM")  # or saving leaves the code out
        return own
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return found[0] if isinstance(found, (list, tuple)) else found
    listed = _listed_class(config)
    if listed is not None:
        return listed
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    raise PyPruneError(
        OPTION,
        name,
        f"is a {kind}, which is no causal language model",
        "Name a model with a causal language-model head.",
    )


def _listed_class(config: Any) -> Any:
    """The class that ``config.architectures`` names, if it is one of the causal ones and takes this configuration.

    Decoders of larger models are listed under the larger model's type, which their own configuration does not have.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ((v,) if isinstance(v, str) else v)}
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None) if name in listed else None
        if cls is not None and isinstance(config, cls.config_class or ()):
            return cls
    return None


def _check_complete(info: dict[str, Any], model: Any, name: str) -> None:
    """Weights that the checkpoint lacks would be random."""
    missing = sorted(info.get("missing_keys", ()))
    if not missing:
        return
    head = model.get_output_embeddings()
    heads = {n for n, p in model.named_parameters() if head is not None and any(p is h for h in head.parameters())}
    if set(missing) <= heads:
        raise PyPruneError(
            OPTION, name, f"has no causal language-model head ({missing[0]} is missing)", "Name a checkpoint with one."
        )
    raise PyPruneError(OPTION, name, f"lacks {len(missing)} of the model's weights, among them {missing[0]}")


def check_finite(model: Any, name: str, option: str = OPTION, hint: str = "The checkpoint is damaged.") -> None:
    """Raises PyPruneError when a weight is NaN or infinite; one pass over each tensor, nothing allocated."""
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            low, high = torch.aminmax(parameter.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad = int((~torch.isfinite(parameter.detach())).sum())
                raise PyPruneError(option, name, f"{tensor_name} has {bad:,} weights that are not finite", hint)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in ``folder``."""
    return any((folder / f).is_file() for f in _TOKENIZER_FILES)


def open_tokenizer(name: str, trust_remote_code: bool, folder: Path | None, **options: Any) -> Any:
    """The tokenizer of ``name``; None where there is none. ``folder`` is the same when it is a local one.

    Raises:
        PyPruneError: there is one that cannot be read.
    """
    from transformers import AutoTokenizer

    if folder is not None and not has_tokenizer(folder):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        if folder is None:
            return None
        raise PyPruneError(OPTION, name, f"has a tokenizer that cannot be read: {_first_line(error)}") from error


def reworded(error: Exception, name: str) -> PyPruneError:
    from huggingface_hub import constants

    text = str(error)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return PyPruneError(
            OPTION, name, "is of a model type that the installed transformers does not know", "Update transformers."
        )
    if "trust_remote_code" in text:
        return _needs_code(name)
    if "mismatched" in text:
        return PyPruneError(OPTION, name, "has weights of other shapes than its config.json says")
    if isinstance(error, OSError) and not Path(name).exists():
        if constants.HF_HUB_OFFLINE:
            problem = "is no local folder, and the hub is not asked, because HF_HUB_OFFLINE is set"
            return PyPruneError(OPTION, name, problem, "Check the path, or unset HF_HUB_OFFLINE.")
        return PyPruneError(
            OPTION,
            name,
            "is neither a local folder nor a model that the hub gives",
            f"The hub says: {_first_line(error)}",
        )
    said = _first_line(error)
    if not isinstance(error, OSError | ValueError | RuntimeError):  # a bare name or number, often
        said = f"{type(error).__name__}: {said}"
    return PyPruneError(OPTION, name, f"cannot be opened: {said}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")

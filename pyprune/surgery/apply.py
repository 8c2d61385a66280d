"""Apply a plan: the dense, smaller model."""

from __future__ import annotations

import copy as _copy
import warnings
from typing import Any

import torch

from pyprune.discovery.run import unwrap
from pyprune.errors import PyPruneError
from pyprune.importance.modes import own_modes
from pyprune.selection.plan import Plan
from pyprune.surgery import skip
from pyprune.surgery.check import can_run, checkable, compare, compare_cached, masked_logits, run
from pyprune.surgery.gguf import drop_config_marks, is_from_gguf
from pyprune.surgery.names import Tensors
from pyprune.surgery.rebuild import rebuild
from pyprune.surgery.transfer import transfer


@own_modes()
def apply(model: Any, plan: Plan, *, copy: bool = False, verify: bool = True, stock_only: bool = False) -> Any:
    """A model of the same class with the units that ``plan`` removes gone: smaller dense matrices, nothing masked.

    The new model has a configuration of its own and is built by the class's own constructor; per-layer widths are in
    ``config.per_layer_config``. Data types, devices, ties, ``requires_grad``, training modes, buffers and the
    generation configuration are those of ``model``. A plan without cuts gives the same weights back, bit for bit.

    Args:
        model: a causal language model of transformers. **Its weights are used up**: they move to the new model layer by
            layer, so that at most one layer is in memory twice, and the old model is left with tensors on the meta
            device. Also when the check below fails.
        plan: made for this model.
        copy: leave ``model`` as it is, at the price of memory for both.
        verify: compare the logits of a few random tokens with those of the old model with the removed weights set to
            zero (only plans whose cuts are all exact; after others the new model is just run). Weights in memory. That
            ``forward`` computes with the old numbers after such a cut is checked in any case, without weights.
        stock_only: refuse cuts that no configuration of the model's class expresses. Otherwise the modules that they
            touch are resized (:mod:`pyprune.surgery.resize`), or where that is impossible their linear layers become
            narrow ones (:mod:`pyprune.surgery.narrow`), with a warning: the result is opened by :func:`pyprune.load`,
            and by plain transformers after ``export(..., "hetero-hf")``.

    Returns:
        The smaller model.

    Raises:
        PyPruneError: when the class cannot have the planned shapes, the plan is for another model, or the model
            carries what cannot be pruned (adapters, quantised weights, hooks, a compiled wrapper).
    """
    model = bare(model)
    check_model(model)
    tensors = Tensors.of(model)
    _check_plan(plan, tensors)
    rebuilt = rebuild(model, plan, stock_only)
    new = rebuilt.model
    for groups, how in ((rebuilt.resized, "modules are resized"), (rebuilt.narrowed, "layers become narrow")):
        if groups:
            warnings.warn(notice(groups, type(model.config).__name__, how), stacklevel=2)

    expected = masked_logits(model, plan, restore=copy) if verify and plan.cuts and checkable(model, plan) else None
    dtype = model.dtype
    if is_from_gguf(model):
        drop_config_marks(new.config)
    transfer(model, new, rebuilt.names, tensors, rebuilt.kept, copy=copy)
    for name, positions in rebuilt.positions.items():
        path, _, last = name.rpartition(".")
        module = new.get_submodule(path)
        module._buffers[last] = torch.from_numpy(positions.copy()).to(next(module.parameters()).device)
    carry(model, new, rebuilt.names.old)
    if expected is not None:
        compare(expected, new, dtype)
        if skip.spec_of(new.config):
            compare_cached(new, dtype)
    elif verify and plan.cuts and can_run(new):
        run(new)
    return new


def notice(groups: tuple[str, ...], config: str, how: str) -> str:
    """What a user should know of groups that no configuration expresses."""
    shown = ", ".join(groups[:3]) + (f" and {len(groups) - 3} more" if len(groups) > 3 else "")
    return f"No {config} expresses the cuts of {shown}: their {how}, for pyprune.load and profile hetero-hf."


def bare(model: Any) -> Any:
    """The transformers model inside ``torch.compile``'s wrapper, or the model itself.

    Raises:
        PyPruneError: it is in another wrapper, or carries an adapter.
    """
    from transformers import PreTrainedModel

    model = unwrap(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "Merge the adapter first: model = model.merge_and_unload()." if "Peft" in name else ""
        raise PyPruneError("model", name, "is not a transformers model", hint or "Pass the model inside the wrapper.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PyPruneError("model", name, "carries an adapter", "Merge or delete the adapter first.")
    return model


def check_model(model: Any) -> None:
    """Raises PyPruneError: the model carries what would be lost in a cut, or cannot be cut."""
    name = type(model).__name__
    if getattr(model, "is_quantized", False) and not is_from_gguf(model):
        raise PyPruneError("model", name, "has quantised weights", "Load it in bfloat16 or float32 and prune that.")
    hint = "Remove them and add them again after."
    for path, parameter in model.named_parameters():
        hooks = _gradient_hooks(parameter)
        if hooks:
            raise PyPruneError("model", path, f"has {hooks} hooks on its gradient, which would be lost", hint)
    for path, module in model.named_modules():
        hooks = _users_hooks(module)
        if hooks:
            raise PyPruneError("model", path or name, f"has {hooks} hooks, which would be lost", hint)
        if hasattr(module, "_hf_hook"):
            raise PyPruneError(
                "model", path or name, "is spread over devices by accelerate", "Load it on one device (no device_map)."
            )


def _gradient_hooks(parameter: torch.Tensor) -> int:
    """Hooks on a parameter's gradient that somebody added."""
    return len(parameter._backward_hooks or ()) + len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())


def _users_hooks(module: Any) -> int:
    """Hooks that somebody added; transformers' own come back by themselves."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _check_plan(plan: Plan, tensors: Tensors) -> None:
    for cut in plan.cuts:
        for member in cut.group.members:
            shape = tensors.shapes.get(member.tensor)
            there = shape[member.dim] if shape is not None and member.dim < len(shape) else None
            top = int(member.index.positions().max())
            if there is not None and top < there and member.size in (None, there):
                continue
            spoken = f"position {top}" if member.size is None else f"of {member.size}"
            raise PyPruneError(
                "plan",
                cut.group.name,
                f"speaks of {member.tensor} dimension {member.dim} {spoken}; this model has "
                f"{'no such tensor' if shape is None else list(shape)}",
                "The plan was made for another model.",
            )


def carry(old: Any, new: Any, old_name: Any) -> None:
    """What is neither weights nor configuration: modes, generation settings, checkpointing."""
    for path, module in new.named_modules():
        source = old.get_submodule(old_name(path))
        module.training = source.training
    if getattr(old, "generation_config", None) is not None:
        new.generation_config = _copy.deepcopy(old.generation_config)
    if any(getattr(m, "gradient_checkpointing", False) for m in old.modules()):
        enable = getattr(new, "activation_checkpointing_enable", new.gradient_checkpointing_enable)
        enable()
    elif getattr(old, "_require_grads_hooks", None):
        new.enable_input_require_grads()
    tied = getattr(old, "all_tied_weights_keys", None)
    if tied is not None:
        new.all_tied_weights_keys = dict(tied)
    for name in ("name_or_path", "model_tags"):
        if hasattr(old, name):
            setattr(new, name, _copy.copy(getattr(old, name)))

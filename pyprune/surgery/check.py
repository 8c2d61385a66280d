"""The last word on a cut: the smaller model computes what the old one computes with the removed weights set to zero.

Removed layers hand on the stream that enters them, removed sub-blocks give zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyprune.caching import cache_argument, cache_of
from pyprune.errors import PyPruneError
from pyprune.importance.blocks import NotSweepable
from pyprune.importance.depth import silenced, without_layers
from pyprune.importance.modes import as_written, evaluating
from pyprune.selection.plan import Plan
from pyprune.surgery.decoder import text_config

TOKENS = 8
"""Length of the text of random tokens that both models read."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference of logits, relative to the largest logit; :data:`COARSE` for narrower types."""

COARSE = 0.1


def checkable(model: Any, plan: Plan) -> bool:
    """Whether masking and slicing are the same thing for this plan, and the model's weights are here."""
    return all(c.group.exact or c.group.modules for c in plan.cuts) and can_run(model)


def can_run(model: Any) -> bool:
    """Whether the model's weights are here, and it is known how many tokens it reads."""
    return hasattr(text_config(model.config), "vocab_size") and not any(p.is_meta for p in model.parameters())


def masked_logits(model: Any, plan: Plan, restore: bool) -> Tensor | None:
    """Logits of ``model`` with the removed positions of every parameter set to zero: float32 [1, TOKENS, vocabulary].

    Layers that the plan removes are passed by, sub-blocks give zeros. None where that cannot be done from outside the
    model.

    Args:
        restore: put the removed weights back afterwards (they are kept aside meanwhile).

    Raises:
        PyPruneError: the model does not run as it is; nothing was changed.
    """
    _run_dense(model)
    parameters = dict(model.named_parameters())
    aside = []
    with torch.no_grad():
        for cut in plan.cuts:
            for name, dim, gone in cut.removed_positions():
                if name not in parameters or not len(gone):
                    continue
                weight = parameters[name]
                index = torch.from_numpy(gone).to(weight.device)
                if restore:
                    aside.append((weight, dim, index, weight.index_select(dim, index)))
                weight.index_fill_(dim, index, 0)
        layers, parts = ([model.get_submodule(p) for p in plan.removed_modules(r)] for r in ("layers", "sublayers"))
        try:
            with without_layers(layers), silenced(parts):
                return logits(model)
        except NotSweepable:
            return None
        finally:
            for weight, dim, index, values in reversed(aside):
                weight.index_copy_(dim, index, values)


def logits(model: Any) -> Tensor:
    """Logits of fixed random tokens, without dropout: float32 [1, TOKENS, vocabulary] on the CPU; of a model without a
    head its last hidden states."""
    with evaluating(model), as_written(), torch.no_grad():
        found = model(input_ids=_tokens(model), use_cache=False)
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return out.float().cpu() if out.dtype != torch.float64 else out.cpu()


def _tokens(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, text_config(model.config).vocab_size, (1, TOKENS), generator=generator).to(model.device)


def compare_cached(model: Any, dtype: torch.dtype) -> None:
    """Raises PyPruneError when a token's logits behind a KV cache are not those without one."""
    tokens = _tokens(model)
    with evaluating(model), as_written(), torch.no_grad():
        cache = cache_of(model(input_ids=tokens[:, :-1], use_cache=True))
        if cache is None:  # a class that keeps none (OpenAI's first GPT)
            return
        past = {cache_argument(model): cache}
        behind = model(input_ids=tokens[:, -1:], use_cache=True, **past).logits[:, -1].cpu()
    plain = logits(model)[:, -1]
    scale = max(1.0, float(plain.abs().max()))
    if not float((plain - behind).abs().max()) <= TOLERANCE.get(dtype, COARSE) * scale:
        problem = (
            "the smaller model says other things with a KV cache: a cache is measured by the first layer of a kind"
        )
        raise PyPruneError("plan", None, problem, "Keep the attention of the first layer of each kind (layers=).")


def _run_dense(model: Any) -> None:
    """What no cut is to blame for is told before weights change."""
    try:
        logits(model)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        hint = "See that it runs in transformers: one data type everywhere (model.to(...)), or verify=False."
        raise PyPruneError("model", type(model).__name__, f"does not run on token ids: {reason}", hint) from error


def run(model: Any) -> Tensor:
    """:func:`logits` of the smaller model; raises PyPruneError when it does not run."""
    try:
        return logits(model)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        hint = "Some kernels want widths that are multiples of 8 (round_to=8)."
        raise PyPruneError("plan", None, f"the smaller model does not run with these widths: {reason}", hint) from error


def compare(masked: Tensor, model: Any, dtype: torch.dtype) -> None:
    """Raises PyPruneError when ``model`` does not run, or its logits differ from ``masked`` by more than rounding."""
    sliced = run(model)
    there = masked.isfinite()  # a vocabulary may be masked by infinities
    if not bool(there.any()):
        return
    scale = max(1.0, float(masked[there].abs().max()))
    difference = float((masked[there] - sliced[there]).abs().max())
    if not difference <= TOLERANCE.get(dtype, COARSE) * scale:
        raise PyPruneError(
            "plan",
            None,
            f"the smaller model is not the old one without the removed units (logits differ by {difference:.3g} on "
            f"random tokens, the largest is {scale:.3g})",
            "A removed size enters this model's arithmetic elsewhere; please report the model class.",
        )

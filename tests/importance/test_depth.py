"""What whole layers are worth, against float64 references that know nothing of the code."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers_surgery import groups_of, tiny
from torch import nn
from torch.nn.functional import cross_entropy

import pyprune
from pyprune.errors import PyPruneError
from pyprune.importance.depth import score_layers


def ids(samples: int = 4, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(5))


def layers_of(model):
    return next(g for g in groups_of(model) if g.role == "layers")


def shortened(model, kept: list[int]):
    """The same model with fewer modules in its list of blocks."""
    out = copy.deepcopy(model)
    body = out.model if hasattr(out, "model") else out.transformer
    name = "layers" if hasattr(body, "layers") else "h"
    setattr(body, name, nn.ModuleList(getattr(body, name)[i] for i in kept))
    for config in (out.config, body.config):
        config.num_hidden_layers = len(kept)
    return out


@torch.no_grad()
def loss_of(model, batch: dict[str, torch.Tensor]) -> float:
    """Mean over samples of the mean over real tokens, one sample at a time."""
    total = 0.0
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for row, real in zip(batch["input_ids"], mask, strict=True):
        short = row[real.bool()]  # padding on the right
        logits = model(short[None], use_cache=False).logits[0].double()
        total += float(cross_entropy(logits[:-1], short[1:]))
    return total / len(batch["input_ids"])


@torch.no_grad()
def influence_of(model, batch: dict[str, torch.Tensor]) -> list[float]:
    """One minus the mean cosine of the hidden states that transformers itself returns; the last one is normed there."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    body = model.model if hasattr(model, "model") else model.transformer
    block = (body.layers if hasattr(body, "layers") else body.h)[-1]
    last = []
    hook = block.register_forward_hook(lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out))
    states = list(model(**batch, output_hidden_states=True, use_cache=False).hidden_states)
    hook.remove()
    states[-1] = last[0]
    out = []
    for x, y in pairwise(states):
        x, y = x[mask].double(), y[mask].double()
        out.append(1 - float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()))
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_block_influence_is_one_minus_the_mean_cosine(family: str) -> None:
    model = tiny(family)
    scores = score_layers(model, layers_of(model), ids(), 1)
    assert scores[layers_of(model).name][0].tolist() == pytest.approx(
        influence_of(model, {"input_ids": ids()}), rel=1e-4
    )


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    mask[3, 5:] = 0
    return {"input_ids": ids().masked_fill(mask == 0, 2), "attention_mask": mask}


def test_padding_counts_nothing_in_block_influence() -> None:
    model = tiny("llama")
    scores = score_layers(model, layers_of(model), [padded()], 1)
    expected = influence_of(model, padded())
    assert scores["model:layers"][0].tolist() == pytest.approx(expected, rel=1e-4)
    other = padded()
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 77)
    assert torch.equal(score_layers(model, layers_of(model), [other], 1)["model:layers"], scores["model:layers"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_removes_the_layer_whose_absence_costs_least_one_after_the_other(family: str) -> None:
    model = tiny(family)
    batch = padded() if family == "llama" else {"input_ids": ids()}
    left, order, losses = [0, 1, 2, 3], [], []
    for _ in range(2):
        found = {i: loss_of(shortened(model, [j for j in left if j != i]), batch) for i in left}
        least = min(found, key=lambda i: found[i])
        order.append(least)
        losses.append(found[least])
        left.remove(least)
    details = score_layers(model, layers_of(model), [batch], 2, "perplexity").details
    assert details["removed"] == order
    assert details["losses"] == pytest.approx(losses, rel=1e-5)
    assert details["loss"] == pytest.approx(loss_of(model, batch), rel=1e-5)


def test_batches_change_nothing() -> None:
    model = tiny("llama")
    for criterion in ("block_influence", "perplexity"):
        one, two = (
            score_layers(model, layers_of(model), list(ids().split(n)), 2, criterion)["model:layers"] for n in (1, 4)
        )
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("criterion", ["block_influence", "perplexity"])
def test_protected_layers_stay_and_the_model_is_left_as_it_was(criterion: str) -> None:
    model = tiny("llama").train()
    before = copy.deepcopy(model.state_dict())
    details = score_layers(model, layers_of(model), ids(), 2, criterion, protected=(1, 3)).details
    assert sorted(details["removed"]) == [0, 2]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_layer_that_does_nothing_is_worth_nothing() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    for criterion in ("block_influence", "perplexity"):
        plan = pyprune.select_layers(model, groups_of(model), ids(), 1, criterion)
        if criterion == "block_influence":  # a random model may well be better off without another layer
            assert plan.details["removed_layers"] == [2]
        assert plan.details["layer_scores"][2] == pytest.approx(0, abs=1e-6)


def test_nan_is_named_by_the_layer_that_gives_it() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for criterion in ("block_influence", "perplexity"):
        with pytest.raises(PyPruneError, match=r"model 'model.layers.1': gives NaN or infinity"):
            score_layers(model, layers_of(model), ids(), 1, criterion)


@pytest.mark.parametrize(
    ("remove", "line"),
    [
        (4, "remove_layers 4: is too many: the model has 4 layers, one has to stay. Ask for at most 3."),
        (40, "remove_layers 40: is too many"),
        (0.95, "remove_layers 0.95: is too many"),
        (0, "remove_layers 0: must be at least 1"),
        (-2, "remove_layers -2: must be at least 1"),
        (-0.5, "remove_layers -0.5: must be a whole number, or a fraction"),
        (1.5, "remove_layers 1.5: must be a whole number, or a fraction"),
        (float("nan"), "remove_layers nan: is not a number"),
        (True, "remove_layers True: is not a number"),
        ("three", "remove_layers 'three': is not a number"),
    ],
)
def test_numbers_that_cannot_be_removed_are_refused(remove, line: str) -> None:
    model = tiny("llama")
    with pytest.raises(PyPruneError) as told:
        pyprune.select_layers(model, groups_of(model), ids(), remove)
    assert str(told.value).startswith(line)


def test_layers_outside_the_range_are_no_choice() -> None:
    model = tiny("llama")
    plan = pyprune.select_layers(model, groups_of(model), ids(), 2, layers="1-2")
    assert plan.details["removed_layers"] == [1, 2]
    with pytest.raises(PyPruneError, match=r"2 of them outside layers= or sharing weights\. Ask for at most 2"):
        pyprune.select_layers(model, groups_of(model), ids(), 3, layers="1-2")


def test_an_unknown_criterion_is_refused_with_the_nearest_name() -> None:
    model = tiny("llama")
    with pytest.raises(PyPruneError, match="Did you mean 'block_influence'"):
        pyprune.select_layers(model, groups_of(model), ids(), 1, "block_influenc")


def test_a_fraction_is_the_nearest_number_of_layers() -> None:
    model = tiny("llama")
    assert len(pyprune.select_layers(model, groups_of(model), ids(), 0.4).details["removed_layers"]) == 2
    assert len(pyprune.select_layers(model, groups_of(model), ids(), 0.01).details["removed_layers"]) == 1


def test_layers_that_are_not_called_in_a_row_are_refused() -> None:
    model = tiny("llama")
    real = model.model.forward

    def twice(*args, **kwargs):
        real(*args, **kwargs)
        return real(*args, **kwargs)

    model.model.forward = twice
    with pytest.raises(PyPruneError, match="cannot be tried on this model: its layers are not called once each"):
        score_layers(model, layers_of(model), ids(), 1)


def test_layers_that_lend_weights_to_others_stay() -> None:
    from pyprune.selection.layers import removable

    model = tiny("llama")
    groups = groups_of(model)
    groups.tied["model.layers.3.mlp.up_proj.weight"] = "model.layers.1.mlp.up_proj.weight"
    assert removable(groups, 1)[2] == (1,)
    groups.tied["lm_head.weight"] = "model.embed_tokens.weight"
    assert removable(groups, 1, "0-2")[2] == (1, 3)

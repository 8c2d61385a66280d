"""REAP against a float64 reference that goes through the experts by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_mixtures import mixture
from torch import Tensor

import pyprune
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.importance import score

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


def ids(samples: int = 6, length: int = 12) -> Tensor:
    return torch.randint(3, 101, (samples, length), generator=torch.Generator().manual_seed(4))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(6, 12, dtype=torch.int64)
    mask[0, 5:] = 0
    mask[4, 8:] = 0
    return {"input_ids": ids().masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def by_hand(model, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Score and number of tokens of every expert, a pair of [experts] for each layer with experts.

    Each expert is run alone on each token that the router gave it, with weights of its own taken from the stack.
    """
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    calls: list[tuple] = []
    modules = [m for m in double.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]
    modules = [m for m in modules if isinstance(m.gate_up_proj, torch.nn.Parameter)]
    for m in modules:
        m.register_forward_pre_hook(lambda m, a, k: calls.append((m, *a, *k.values())), with_kwargs=True)
    double(**batch, use_cache=False)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
    scores, counts = [], []
    for m, x, chosen, gates in calls:
        experts = m.down_proj.shape[0]
        total, tokens = torch.zeros(experts).double(), torch.zeros(experts)
        for t in mask.nonzero().flatten().tolist():
            for k, e in enumerate(chosen.reshape(-1, chosen.shape[-1])[t].tolist()):
                state = x.reshape(-1, x.shape[-1])[t]
                if hasattr(m, "down_proj_bias"):  # gpt_oss: [inputs, outputs] with biases, its own activation
                    inner = m._apply_gate((state @ m.gate_up_proj[e] + m.gate_up_proj_bias[e])[None])[0]
                    y = inner @ m.down_proj[e] + m.down_proj_bias[e]
                else:
                    gate, up = (m.gate_up_proj[e] @ state).chunk(2)
                    y = m.down_proj[e] @ (m.act_fn(gate) * up)
                g = gates.reshape(-1, gates.shape[-1])
                total[e] += float(g[t, k]) * y.norm()
                tokens[e] += 1
        scores.append(total / tokens.clamp_min(1))
        counts.append(tokens)
    return scores, counts


@pytest.mark.parametrize("batch", [{"input_ids": ids()}, padded()], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_experts_score_is_the_mean_gated_norm_over_its_tokens(family: str, batch) -> None:
    model = mixture(family)
    groups = discover(model)
    found = score(model, groups, [batch], "reap", roles=["experts"])
    expected, counts = by_hand(model, batch)
    names = [g.name for g in groups.prunable(["experts"])]
    assert len(names) == len(expected) == 2 and set(found) == set(names)
    for name, want, tokens in zip(names, expected, counts, strict=True):
        assert found.details["tokens_of_experts"][name] == tokens.int().tolist()
        torch.testing.assert_close(found[name][0].double(), want, rtol=1e-4, atol=1e-7)
        assert len(set(found[name][0].tolist())) > 1


def test_experts_are_counted_alike_in_any_batches_and_the_model_is_left_as_it_was() -> None:
    model = mixture("mixtral")
    groups, implementation = discover(model), model.config._experts_implementation
    one, two = (score(model, groups, list(ids().split(n)), "reap", roles=["experts"]) for n in (1, 6))
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    assert model.config._experts_implementation == implementation


def test_the_weakest_expert_goes_and_the_gates_of_the_others_are_made_one_again() -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[3] *= 1e-3
    out = pyprune.prune(model, widths={"experts": 4}, criterion="reap", calibration=ids(), copy=True)
    assert all(c.kept == ((0, 1, 2, 4),) for c in out.plan.cuts) and len(out.plan.cuts) == 2
    assert out.model.config.num_local_experts == 4
    sums: list[Tensor] = []
    for layer in out.model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda m, a: sums.append(a[2].sum(-1)))
    with torch.no_grad():
        out.model(ids())
    assert len(sums) == 2 and all(torch.allclose(s, torch.ones_like(s), atol=1e-6) for s in sums)


def test_other_roles_are_refused() -> None:
    model = mixture("mixtral")
    with pytest.raises(PyPruneError, match=r"criterion 'reap': scores experts alone, and .* is of role"):
        score(model, discover(model), ids(), "reap", roles=["experts", "kv_heads"])


def test_an_overflow_is_named_by_its_layer_and_expert() -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].fill_(3e38)
    with pytest.raises(PyPruneError, match=r"model 'model.layers.0.mlp.*': gives NaN or infinity \(expert 2\)"):
        score(model, discover(model), ids(), "reap", roles=["experts"])


def test_a_route_means_nothing_to_it() -> None:
    model = mixture("mixtral")
    with pytest.raises(PyPruneError, match="means nothing to criterion 'reap'"):
        score(model, discover(model), ids(), "reap", roles=["experts"], route="gradients")


@pytest.mark.parametrize("criterion", ["wanda", "flap", "obs", "reap"])
def test_padding_that_is_routed_to_experts_counts_nothing(criterion: str) -> None:
    model = mixture("mixtral")
    groups, role = discover(model), "experts" if criterion == "reap" else "expert_ffn"
    found = []
    for token in (0, 77):
        batch = padded()
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, token)
        found.append(score(model, groups, [batch], criterion, roles=[role]))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=0)


def test_experts_that_are_routed_in_groups_have_a_score_each() -> None:
    model = mixture("deepseek_v3")
    groups = discover(model)
    found = score(model, groups, ids(), "reap", roles=["experts"])
    plain = score(model, groups, ids(), "reap", roles=["experts"], aggregation="prod")
    for group in (g for g in groups if g.role == "experts" and not g.frozen):
        assert found[group.name].shape == (group.outer, group.units)
        assert bool((found[group.name] > 0).any()) and torch.equal(found[group.name], plain[group.name])


@torch.no_grad()
def test_the_rows_of_an_expert_count_what_their_tokens_count() -> None:
    """``wanda`` of an expert's channel: the output that goes with it, every token weighed by 1 / mean(h^2)."""
    model = mixture("mixtral")
    seen: list[tuple] = []
    block = model.model.layers[1]
    handles = [
        block.mlp.experts.register_forward_pre_hook(lambda m, a: seen.append(a)),
        block.register_forward_hook(lambda m, a, out: seen.append((out if isinstance(out, Tensor) else out[0],))),
    ]
    model(ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    (x, chosen, *_), (stream,) = seen
    x, stream = x.reshape(-1, x.shape[-1]).double(), stream.reshape(-1, stream.shape[-1]).double()
    experts = block.mlp.experts
    found = {
        how: score(model, discover(model), ids(), "wanda", roles=["expert_ffn"], token_weights=how)
        for how in ("inverse", "equal")
    }
    name = next(n for n in found["equal"] if ".layers.1." in n)
    for how, weights in (("inverse", 1 / stream.square().mean(1)), ("equal", torch.ones(len(x)).double())):
        want = []
        for e in range(experts.down_proj.shape[0]):
            rows = (chosen.reshape(len(x), -1) == e).any(1)
            gate, up = (x[rows] @ experts.gate_up_proj[e].double().T).chunk(2, 1)
            power = (weights[rows, None] * (experts.act_fn(gate) * up).square()).sum(0)
            want.append(power * experts.down_proj[e].double().square().sum(0) / rows.sum())
        got = found[how][name][0].double()  # a channel goes from all experts alike
        torch.testing.assert_close(got, torch.stack(want).sum(0), rtol=1e-3, atol=0)

"""Compensation on whole models: layer by layer, for every selector, and its mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids, off, planned
from helpers_families import NAMED, build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import pyprune
from pyprune import apply, cutting, discover, score, select
from pyprune.compensation import compensate
from pyprune.compensation.refit import PENALTIES, Sums, refit
from pyprune.errors import PyPruneError
from pyprune.importance.walk import Walk
from pyprune.selection.plan import Plan


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_the_refit_lowers_the_held_out_error_in_every_layer_and_that_of_the_logits(changes: dict[str, bool]) -> None:
    dense = tiny_llama(**changes)
    plan = planned(dense, kv_heads=1, ffn=16)
    without = apply(dense, plan, copy=True)
    fitted = copy.deepcopy(dense)
    done = compensate(fitted, plan, ids(120))
    assert [m.tensor.split(".")[-2] for m in done.matrices] == ["o_proj", "down_proj"] * 3
    assert all(m.after < m.before for m in done.matrices)
    assert off(apply(fitted, plan), dense) < off(without, dense)


@pytest.mark.parametrize(
    "criterion", ["random", "l1", "l2", "taylor", "fisher", "group_fisher", "wanda", "flap", "obs"]
)
def test_it_goes_with_every_selector(criterion: str) -> None:
    dense = tiny_llama()
    plan = planned(dense, criterion, ffn=14)
    done = compensate(dense, plan, ids())
    assert len(done.matrices) == 3
    assert all(m.after <= m.before for m in done.matrices) and any(m.after < m.before for m in done.matrices)
    assert apply(dense, plan)(ids(2)).logits.isfinite().all()


def test_one_layer_is_the_closed_form_in_float64() -> None:
    dense = tiny_llama(dtype=torch.float64)
    groups = discover(dense)
    plan = select(groups, score(dense, groups, ids(8), "l2", roles=["ffn"]), widths={"ffn": 15}, layers=[1])
    layer, seen, streams = dense.model.layers[1], [], []
    handles = [layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
               layer.register_forward_hook(lambda m, args, out: streams.append(out))]  # fmt: skip
    calibration = ids(10)
    with torch.no_grad():
        dense(calibration)
    for handle in handles:
        handle.remove()
    weight = layer.mlp.down_proj.weight.detach().clone()
    counts = 1 / streams[0].square().mean(-1)
    kept = torch.tensor(plan["model.layers.1.mlp:ffn"].kept[0])
    parts = []
    for rows in ([0, 1, 3, 4, 5, 6, 8, 9], [2, 7]):  # one in five samples, evenly
        part = Sums(torch.zeros(24, 24, dtype=torch.float64))
        part.add(seen[0][rows].reshape(-1, 24), counts[rows].reshape(-1))
        parts.append(part)
    want = refit(weight, kept, *parts)
    done = compensate(dense, plan, calibration)
    assert done.matrices[0].penalty == want.penalty in PENALTIES
    # Tokens are weighted in float32, whatever the model's type.
    torch.testing.assert_close(layer.mlp.down_proj.weight.detach(), want.weight, rtol=1e-5, atol=1e-6)
    assert done.matrices[0].after == pytest.approx(want.after, rel=1e-4)


def test_later_layers_are_fitted_on_what_the_compensated_ones_give() -> None:
    """Refitting layer 2 alone, after layers 0 and 1 were refitted, finds what the whole run found."""
    whole, parts = tiny_llama(), tiny_llama()
    plan = planned(whole, ffn=14)
    compensate(whole, plan, ids())
    for i in range(3):
        compensate(parts, Plan((plan[f"model.layers.{i}.mlp:ffn"],)), ids())
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_slicing_after_compensation_changes_nothing() -> None:
    model = tiny_llama()
    plan = planned(model, kv_heads=1, ffn=16)
    compensate(model, plan, ids())
    with torch.no_grad():
        masked = model(ids(4, seed=1)).logits
        torch.testing.assert_close(apply(model, plan)(ids(4, seed=1)).logits, masked, rtol=1e-4, atol=1e-4)


def test_only_output_projections_change() -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    compensate(model, planned(dense, kv_heads=1, ffn=16), ids())
    changed = {
        n for (n, a), b in zip(model.named_parameters(), dense.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == {f"model.layers.{i}.{n}.weight" for i in range(3) for n in ("self_attn.o_proj", "mlp.down_proj")}
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_a_plan_without_cuts_leaves_every_bit() -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    assert compensate(model, Plan(), ids()).matrices == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_the_mean_bias_gives_the_dense_mean_exactly() -> None:
    dense = tiny_llama(dtype=torch.float64, mlp_bias=True)
    groups = discover(dense)
    plan = select(groups, score(dense, groups, ids(8), "flap", roles=["ffn"]), widths={"ffn": 9}, layers=[0])
    means = []

    def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        means.append(out.mean((0, 1)))

    model = copy.deepcopy(dense)
    done = compensate(model, plan, ids(), "bias")
    assert [m.tensor for m in done.matrices] == ["model.layers.0.mlp.down_proj.weight"]
    model = apply(model, plan)
    with torch.no_grad():
        for one in (dense, model):
            handle = one.model.layers[0].mlp.down_proj.register_forward_hook(keep)
            one(ids())
            handle.remove()
    torch.testing.assert_close(means[0], means[1], rtol=1e-9, atol=1e-9)


def test_the_stream_target_brings_the_streams_nearer() -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=10)
    found = {}
    for target in ("own", "stream"):
        model = copy.deepcopy(dense)
        done = compensate(model, plan, ids(160), target=target)
        found[target] = off(apply(model, plan), dense)
    assert any(m.blend > 0 for m in done.matrices)
    assert found["stream"] < found["own"]


def test_padding_counts_nothing() -> None:
    whole, padded = tiny_llama(), tiny_llama()
    plan = planned(whole, ffn=14)
    tokens = ids(20)
    compensate(whole, plan, tokens)
    longer = torch.cat([tokens, torch.zeros(20, 5, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(20, 16), torch.zeros(20, 5)], dim=1).long()
    compensate(padded, plan, [{"input_ids": longer, "attention_mask": mask}])
    for a, b in zip(whole.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_padding_that_is_routed_to_experts_counts_nothing() -> None:
    fitted = []
    for fill in (3, 7):
        model = mixture("mixtral")
        plan = planned(model, "l2", expert_ffn=12)
        tokens = torch.cat([ids(20), torch.full((20, 6), fill)], dim=1)
        mask = torch.cat([torch.ones(20, 16), torch.zeros(20, 6)], dim=1).long()
        compensate(model, plan, [{"input_ids": tokens, "attention_mask": mask}])
        fitted.append([p.detach().clone() for n, p in model.named_parameters() if "experts" in n])
    for a, b in zip(*fitted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["GPT-2", "GPT-NeoX", "GPT-J", "BLOOM", "OPT", "Phi-3", "Gemma 2", "Qwen3", "Mixtral", "Falcon, grouped"]
)
def test_families_without_names_in_common_are_compensated(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    groups = discover(model).thaw(("kv_heads", "query_heads"))
    roles = [r for r in (NAMED[family].heads, *NAMED[family].ffn) if r is not None]
    tokens = ids(24, vocabulary=101)
    scores = score(model, groups, tokens, "wanda", roles=roles)
    rounding = {"expert_ffn": 8} if "expert_ffn" in roles else None  # the grouped product wants such widths
    plan = select(groups, scores, widths={r: 0.67 for r in roles}, round_to=rounding)
    done = compensate(model, plan, tokens)
    assert len(done.matrices) >= 2 * len(roles)
    assert all(m.after <= m.before for m in done.matrices)
    assert sum(m.after < m.before for m in done.matrices) > len(done.matrices) / 2
    assert not [n for n in done.notes if "take over" in n]
    assert apply(model, plan)(tokens[:2]).logits.isfinite().all()


def refused(option: str, part: str, **given: object) -> None:
    model = given.pop("model", None) or tiny_llama()
    plan = given.pop("plan", None) or planned(tiny_llama(), ffn=14)
    with pytest.raises(PyPruneError, match=part) as error:
        compensate(model, plan, given.pop("batches", ids(4)), **given)
    assert error.value.option == option


def test_mistakes_are_named() -> None:
    refused("compensation", "not known", mode="least_squares")
    refused("compensation_target", "not known", target="dense")
    refused("token_weights", "not known", token_weights="norm")
    refused("samples", "leave none to choose", batches=ids(1))
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    refused("compensation", "with a bias", mode="bias", model=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    refused("calibration", "token id", batches=ids(4) + 97)


def test_a_plan_that_cuts_the_residual_stream_is_refused() -> None:
    model = tiny_llama()
    refused("compensation", "cuts of hidden", plan=planned(model, "l2", hidden=28))


def test_weights_or_activations_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    refused("model", "holds NaN or infinity", model=model)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e30)
    refused("model", "inputs with NaN or infinity", model=model)


def test_few_tokens_are_answered_with_a_note() -> None:
    model = tiny_llama()
    done = compensate(model, planned(model, ffn=20), ids(6, length=3))
    assert any("fewer tokens" in n for n in done.notes)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_whole_line_compensates_and_says_so() -> None:
    dense, tokens = tiny_llama(), ids(20)
    options = {"widths": {"ffn": 14}, "calibration": tokens, "criterion": "obs"}
    plain = pyprune.prune(dense, copy=True, **options)
    kept = copy.deepcopy(dense)
    out = pyprune.prune(dense, copy=True, compensation="least-squares", **options)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), kept.parameters(), strict=True))
    assert off(out.model, dense) < off(plain.model, dense)
    assert plain.report.compensation is None and len(out.report.compensation) == 1
    assert len(out.report.to_dict()["compensation"][0]["matrices"]) == 3


def test_every_step_of_iterative_pruning_compensates() -> None:
    options = {"ratio": 0.2, "roles": "ffn", "calibration": ids(20), "criterion": "wanda", "iterative_steps": 2}
    out = pyprune.prune(tiny_llama(), compensation="least-squares", **options)
    assert [len(step["matrices"]) for step in out.report.compensation] == [3, 3]


def test_the_whole_line_refuses_before_it_scores() -> None:
    for options, option in (
        ({"criterion": "l2", "widths": {"ffn": 14}}, "calibration"),
        ({"calibration": ids(1), "widths": {"ffn": 14}}, "samples"),
        ({"calibration": ids(4), "criterion": "l2", "widths": {"hidden": 28}}, "compensation"),
    ):
        with pytest.raises(PyPruneError) as error:
            pyprune.prune(tiny_llama(), compensation="least-squares", **options)
        assert error.value.option == option


def test_a_criterion_of_its_own_decides_how_much_each_layer_loses() -> None:
    options = {"widths": {"ffn": 0.5}, "calibration": ids(20), "criterion": "wanda", "allocation": "knapsack"}
    alone = pyprune.prune(tiny_llama(), **options)
    out = pyprune.prune(tiny_llama(), allocation_criterion="group_fisher", **options)
    assert out.plan.details["allocation_criterion"] == "group_fisher"
    assert out.scores.criterion == alone.scores.criterion == "wanda"
    assert out.plan.details["widths"] != alone.plan.details["widths"]
    assert "score for allocation" in [s["name"] for s in out.report.stages]


def test_what_it_reads_may_be_bounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = {}, cutting.score

    def watched(model, groups, batches, **options):
        read[options["criterion"]] = batches.tokens
        return real(model, groups, batches, **options)

    monkeypatch.setattr(cutting, "score", watched)
    options = {
        "widths": {"ffn": 0.5}, "calibration": ids(20), "criterion": "wanda", "allocation": "knapsack",
        "allocation_criterion": "group_fisher",
    }  # fmt: skip
    length = ids(20).shape[1]
    pyprune.prune(tiny_llama(), allocation_tokens=4 * length, **options)
    assert read == {"wanda": 20 * length, "group_fisher": 4 * length}
    pyprune.prune(tiny_llama(), score_tokens=6 * length, **options)
    assert read == {"wanda": 6 * length, "group_fisher": 6 * length}


def test_weights_of_16_bits_are_refitted_and_keep_their_type() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    done = compensate(model, planned(model, kv_heads=1, ffn=16), ids(120))
    assert all(m.after < m.before for m in done.matrices)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("target", ["own", "stream"])
def test_blocks_that_need_not_run_again_give_what_running_them_again_gives(
    changes: dict[str, bool], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, again = tiny_llama(**changes), tiny_llama(**changes)
    plan = planned(kept, kv_heads=1, ffn=14)
    compensate(kept, plan, ids(), target=target)
    runs = []
    monkeypatch.setattr("pyprune.compensation.stage.KEPT_BYTES", 0)
    advance = Walk.advance
    monkeypatch.setattr(Walk, "advance", lambda walk, i: (runs.append(i), advance(walk, i))[1])
    compensate(again, plan, ids(), target=target)
    assert runs == [0, 1]  # nothing is behind the last one
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class _Experts(nn.Module):
    """Experts in a list, each token to one of them."""

    def __init__(self, config: Any, experts: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(experts))
        self.router = nn.Linear(config.hidden_size, experts, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        x = h.view(-1, h.shape[-1])
        share, at = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (at == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, share[rows, None] * expert(x[rows]))
        return out.view_as(h)


def test_experts_that_the_first_sample_does_not_reach_are_refitted_too() -> None:
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = _Experts(model.config)
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    groups = discover(model)
    roles = [r for r in ("ffn", "expert_ffn") if groups.prunable([r])]
    batches = [{"input_ids": torch.full((1, 4), 5)}, *({"input_ids": ids(1, 64, seed=s)} for s in range(11))]
    plan = select(groups, score(model, groups, batches, "l2"), 0.2, roles=roles)
    done = compensate(model, plan, batches)
    assert len(done.matrices) == len(plan.cuts) == 12 and not done.notes


@pytest.mark.parametrize("mode", ["least-squares", "obs"])
def test_no_refit_of_half_precision_overflows(mode: str) -> None:
    """In the last layer half of the channels are weak copies of the others, which go: ten thousands would make up."""
    model = tiny_llama(num_hidden_layers=2)
    ffn = model.model.layers[1].mlp
    half = ffn.up_proj.weight.shape[0] // 2
    with torch.no_grad():
        for matrix in (ffn.gate_proj, ffn.up_proj):
            matrix.weight.copy_(matrix.weight[:1].clone())
        ffn.up_proj.weight[:half] *= 600
        ffn.up_proj.weight[half:] *= 1e-3
        ffn.down_proj.weight[:, half:] *= 1000
    out = pyprune.prune(
        model.half(), widths={"ffn": half}, criterion="l1", compensation=mode, calibration=ids(), method="plain"
    )
    assert all(bool(p.isfinite().all()) for p in out.model.parameters())

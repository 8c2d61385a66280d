"""The inner refit: gate and up projections follow a down projection that was refitted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids, off, planned
from helpers_families import liven
from torch import Tensor, nn

from pyprune import apply
from pyprune.compensation import compensate, inner, stage
from pyprune.compensation.feeders import FeederTaps, Program, rows_of
from pyprune.compensation.stage import Compensation
from pyprune.errors import PyPruneError
from pyprune.importance.steps import Forward
from pyprune.importance.walk import walking

SIZES = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FFNS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {**SIZES, "intermediate_size": 48},
    "OPTConfig": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "max_position_embeddings": 64},  # plain, biases
    "GPT2Config": {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},  # [inputs, outputs]
    "Phi3Config": {**SIZES, "intermediate_size": 48, "pad_token_id": 0},  # gate and up in one matrix
}


def model_of(config: str) -> nn.Module:
    import transformers as t

    t.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return liven(t.AutoModelForCausalLM.from_config(getattr(t, config)(**FFNS[config])).eval())


def fitted(dense: nn.Module, batches: Tensor, **options: Any) -> tuple[nn.Module, Compensation]:
    model = copy.deepcopy(dense)
    return model, compensate(model, planned(dense, ffn=0.7), batches, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("config", FFNS)
def test_it_lowers_the_held_out_error_of_every_kind_of_ffn_and_that_of_the_logits(config: str) -> None:
    dense, batches = model_of(config), ids(120, 24)
    plain, before = fitted(dense, batches)
    model, done = fitted(dense, batches, scope="ffn")
    first = done.matrices[0]
    assert first.after_outputs is not None and first.after_outputs == before.matrices[0].after
    assert any(m.after_outputs is not None for m in done.matrices[1:])
    assert all(m.after_outputs is None or m.after < m.after_outputs < m.before for m in done.matrices)
    masked = off(model, dense)
    assert masked < off(plain, dense)
    assert off(apply(model, done.plan), dense) == pytest.approx(masked, rel=1e-3)


@pytest.mark.parametrize("config", FFNS)
def test_what_lies_before_the_projection_can_be_done_again_for_other_tokens_and_fewer_channels(config: str) -> None:
    dense = model_of(config)
    parameters = dict(dense.named_parameters())
    cut = planned(dense, ffn=0.7).cuts[0]
    names = ("down_proj.weight", "fc2.weight", "mlp.c_proj.weight")
    reader, dim = next((m.tensor, m.dim) for m in cut.group.members if m.tensor.endswith(names))
    inputs, rows = rows_of(cut, reader, dim, parameters)
    module = dense.get_submodule(reader.rsplit(".", 1)[0])
    read: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().reshape(-1, args[0].shape[-1])))
    with walking(dense, {}), FeederTaps(reader, [r.tensor for r in rows], parameters) as taps, torch.no_grad():
        dense(ids(2, 8))
        first = taps.take()
        dense(ids(3, 5, seed=1))
        given = taps.take()
    assert first is not None and given is not None
    assert all(len(g.x) == 15 for g in given.values())
    kept = {r.tensor: sorted({int(k) for q in rows if q.tensor == r.tensor for k in q.positions}) for r in rows}
    products = {}
    for r in rows:
        matrix = parameters[r.tensor] if r.dim == 0 else parameters[r.tensor].t()
        bias = given[r.tensor].bias
        z = given[r.tensor].x @ matrix[kept[r.tensor]].t()
        products[r.tensor] = (z if bias is None else z + bias[kept[r.tensor]]).detach()
    before = {n: z.clone() for n, z in products.items()}
    assert torch.allclose(taps.program(products), read[1][:, inputs], atol=1e-5)
    assert all(torch.equal(z, before[n]) for n, z in products.items())


def test_an_ffn_that_cannot_be_done_again_for_fewer_channels_is_left_as_the_refit_made_it() -> None:
    dense = model_of("LlamaConfig")
    for layer in dense.model.layers:  # type: ignore[union-attr]
        layer.mlp.act_fn = _Scaled(48)
    before, _ = fitted(dense, ids(60))
    model, done = fitted(dense, ids(60), scope="ffn")
    assert len(done.matrices) == 2 and all(m.after_outputs is None and m.penalty is not None for m in done.matrices)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_an_ffn_with_a_number_for_each_token_is_left_as_the_refit_made_it() -> None:
    class Gated(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.token = nn.Linear(mlp.up_proj.in_features, 1)

        def forward(self, h: Tensor) -> Tensor:
            x = h.reshape(-1, h.shape[-1])
            a = torch.relu(self.gate_proj(x)) * self.up_proj(x) * self.token(x).sigmoid()
            return self.down_proj(a).view_as(h)

    dense = model_of("LlamaConfig")
    for layer in dense.model.layers:  # type: ignore[union-attr]
        layer.mlp = Gated(layer.mlp)
    _, done = fitted(dense, ids(60), scope="ffn")
    assert len(done.matrices) == 2 and all(m.after_outputs is None and m.penalty is not None for m in done.matrices)


def test_an_ffn_whose_gate_is_its_up_projection_is_left_as_the_refit_made_it() -> None:
    dense = model_of("LlamaConfig")
    for layer in dense.model.layers:  # type: ignore[union-attr]
        layer.mlp.gate_proj = layer.mlp.up_proj
    before, _ = fitted(dense, ids(60))
    model, done = fitted(dense, ids(60), scope="ffn")
    assert len(done.matrices) == 2 and all(m.after_outputs is None and m.penalty is not None for m in done.matrices)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class _Scaled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.scale


def test_a_program_that_ends_elsewhere_is_not_complete() -> None:
    program, z = Program(), torch.randn(3, 4)
    program.begin("gate", z)
    program.write(torch.relu, (z,), {}, out := torch.relu(z))
    program.end(torch.randn(3, 4))
    assert not program.complete(["gate"])
    program = Program()
    program.begin("gate", z)
    program.write(torch.relu, (z,), {}, out)
    program.end(out)
    assert program.complete(["gate"]) and not program.complete(["gate", "up"])


def test_a_reconstruction_that_raises_the_held_out_error_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "KEPT_BYTES", 0)  # streams go on by the same sums in both
    dense = model_of("LlamaConfig")
    plain, _ = fitted(dense, ids(120))
    monkeypatch.setattr(inner, "reconstruct", lambda _, feeders, reader, *rest: (
        {n: torch.randn_like(f.matrix) for n, f in feeders.items()}, reader
    ))  # fmt: skip
    model, done = fitted(dense, ids(120), scope="ffn")
    assert same(model, plain) and all(m.after_outputs is None for m in done.matrices)


def test_one_with_nan_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "KEPT_BYTES", 0)
    dense = model_of("LlamaConfig")
    monkeypatch.setattr(inner, "reconstruct", lambda _, feeders, reader, *rest: (
        {n: torch.full_like(f.matrix, torch.nan) for n, f in feeders.items()}, reader
    ))  # fmt: skip
    assert same(fitted(dense, ids(), scope="ffn")[0], fitted(dense, ids())[0])


def test_heads_are_refitted_as_without_it_and_obs_chooses_first() -> None:
    dense = model_of("LlamaConfig")
    model = copy.deepcopy(dense)
    done = compensate(model, planned(dense, kv_heads=3, ffn=34), ids(120), "obs", scope="ffn")
    heads = [m for m in done.matrices if m.tensor.endswith("o_proj.weight")]
    channels = [m for m in done.matrices if m.tensor.endswith("down_proj.weight")]
    assert len(heads) == len(channels) == 2
    assert all(m.after_outputs is None for m in heads) and any(m.after_outputs is not None for m in channels)
    masked = off(model, dense)
    assert off(apply(model, done.plan), dense) == pytest.approx(masked, rel=1e-3)


def test_padding_counts_nothing() -> None:
    dense, batches = model_of("LlamaConfig"), ids(60)
    wide = torch.cat([batches, torch.full((60, 8), 5)], dim=1)
    mask = torch.cat([torch.ones_like(batches), torch.zeros(60, 8, dtype=torch.int64)], dim=1)
    padded = [{"input_ids": wide, "attention_mask": mask}]
    a, b = (fitted(dense, x, scope="ffn")[0] for x in (batches, padded))  # type: ignore[arg-type]
    assert all(torch.allclose(p, q, atol=2e-2) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not same(a, fitted(dense, batches)[0])


def test_bfloat16_models_stay_finite() -> None:
    dense = model_of("LlamaConfig").bfloat16()
    model, _ = fitted(dense, ids(60), scope="ffn")
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def test_what_was_found_is_kept_on_the_disk_and_needs_no_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = model_of("OPTConfig")
    plan, first, again = planned(dense, ffn=0.7), copy.deepcopy(dense), copy.deepcopy(dense)
    done = compensate(first, plan, ids(60), scope="ffn", cache=tmp_path)
    monkeypatch.setattr(Forward, "__call__", lambda *_: pytest.fail("the model was run again"))
    read = compensate(again, plan, ids(60), scope="ffn", cache=tmp_path)
    assert same(first, again) and read.matrices == done.matrices
    assert any(m.after_outputs is not None for m in read.matrices)


@pytest.mark.parametrize("options", [{"mode": "bias"}, {"target": "stream"}])
def test_it_goes_with_refits_towards_the_own_output_only(options: dict[str, str]) -> None:
    dense = model_of("OPTConfig")
    with pytest.raises(PyPruneError, match="compensation_scope 'ffn': does not go with compensation"):
        compensate(dense, planned(dense, ffn=0.7), ids(), scope="ffn", **options)

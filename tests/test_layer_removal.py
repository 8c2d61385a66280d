"""Whole layers out of real classes: what is left computes what the old model computes without them."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from helpers_run import tiny_llama as saved_llama
from helpers_run import write_model, write_text
from helpers_surgery import tiny

import pyprune
from pyprune.config import PruneConfig
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.preflight import check_request
from pyprune.selection import Plan, compose
from pyprune.selection.layers import removable, without
from pyprune.surgery import apply


def tiny_gemma3():
    """Five sliding layers to one full, twice over in small: the pattern is a list in the configuration."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4, layer_types=kinds,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model.eval()


MODELS = {"llama": lambda: tiny("llama"), "gpt2": lambda: tiny("gpt2"), "gemma3": tiny_gemma3}
GONE = {"llama": [0, 2], "gpt2": [1, 2], "gemma3": [1, 2, 5]}


def ids(samples: int = 4, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(5))


def blocks_of(model):
    body = model.model if hasattr(model, "model") else model.transformer
    return body.layers if hasattr(body, "layers") else body.h


@torch.no_grad()
def logits_skipping(model, gone: list[int]) -> torch.Tensor:
    """Logits of the whole model with these blocks giving back what they are given."""
    whole = copy.deepcopy(model)
    for i in gone:
        block = blocks_of(whole)[i]
        real = block.forward

        def passed_by(x, *args, real=real, **kwargs):
            out = real(x, *args, **kwargs)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        block.forward = passed_by
    return whole(ids(), use_cache=False).logits


def without_plan(model, gone: list[int]) -> Plan:
    groups = discover(model)
    return without(groups, removable(groups, len(gone))[0], gone)


@pytest.mark.parametrize("family", MODELS)
def test_the_cut_model_is_the_old_one_with_those_blocks_passed_by(family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, gone = MODELS[family](), GONE[family]
    expected = logits_skipping(model, gone)
    smaller = apply(model, without_plan(model, gone), copy=True)
    with torch.no_grad():
        assert (smaller(ids(), use_cache=False).logits - expected).abs().max() < 1e-5
    assert smaller.config.num_hidden_layers == len(blocks_of(model)) - len(gone)
    if family == "gemma3":
        kinds = [k for i, k in enumerate(model.config.layer_types) if i not in gone]
        assert list(smaller.config.layer_types) == kinds

    pyprune.save(smaller, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(ids(), use_cache=False).logits, smaller(ids(), use_cache=False).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    with_cache, without_cache = (again.generate(ids(2, 9), use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without_cache)
    assert torch.equal(with_cache, smaller.generate(ids(2, 9), use_cache=True, **options))


def double_a_matrix(monkeypatch) -> None:
    """From now on a cut model has one matrix twice as large as it should be."""
    home = sys.modules["pyprune.surgery.apply"]
    real = home.transfer

    def wrong(old, new, *rest, **more):
        real(old, new, *rest, **more)
        new.model.layers[1].mlp.down_proj.weight.data.mul_(2)

    monkeypatch.setattr(home, "transfer", wrong)


def test_logits_are_compared_when_layers_go(monkeypatch) -> None:
    """The cut model's are held against those of the old one with the layers passed by."""
    model = tiny("llama")
    double_a_matrix(monkeypatch)
    with pytest.raises(PyPruneError, match="the smaller model is not the old one"):
        apply(model, without_plan(model, [1]), copy=True)


def test_a_layer_whose_arithmetic_knows_its_number_is_not_passed_off_as_the_same() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PyPruneError, match="scaling': would change from"):
        apply(model, without_plan(model, [1]), copy=True)


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("criterion", ["block_influence", "perplexity"])
def test_layers_alone_go_when_no_size_is_asked(criterion: str) -> None:
    dense = saved_llama()
    out = pyprune.prune(dense, remove_layers=2, layer_criterion=criterion, calibration=tokens(), copy=True)
    assert out.model.config.num_hidden_layers == 2
    assert out.model.config.intermediate_size == 192
    assert out.report.depth["criterion"] == criterion
    chosen = pyprune.select_layers(dense, discover(dense), tokens(), 2, criterion)
    assert out.report.depth["removed_layers"] == chosen.details["removed_layers"]
    assert out.report.parameters == chosen.details["achieved"]
    assert json.dumps(out.report.to_dict())


@pytest.mark.parametrize("more", [{"ratio": 0.35}, {"target_params": 208_000}, {"ratio": 0.35, "iterative_steps": 2}])
def test_layers_first_and_widths_then_come_to_the_total_asked_for(more) -> None:
    dense = saved_llama()
    out = pyprune.prune(dense, remove_layers=1, calibration=tokens(), copy=True, **more)
    assert out.report.parameters["with_embeddings"]["after"] == pytest.approx(208_200, rel=0.004)
    assert out.model.num_parameters() == out.report.parameters["with_embeddings"]["after"]
    assert out.model.config.num_hidden_layers == 3 and out.model.config.intermediate_size < 192
    again = apply(dense, out.plan, copy=True)
    assert all(torch.equal(v, out.model.state_dict()[k]) for k, v in again.state_dict().items())


def test_widths_are_scored_on_what_the_removed_layers_leave() -> None:
    dense = saved_llama()
    groups = discover(dense)
    out = pyprune.prune(dense, remove_layers=1, ratio=0.35, roles="ffn", calibration=tokens(), copy=True)
    first = pyprune.select_layers(dense, groups, tokens(), 1)
    shorter = apply(dense, first, copy=True)
    now = discover(shorter)
    scores = pyprune.score(shorter, now, tokens(), roles=["ffn"])
    target = groups.num_parameters() - round(0.35 * groups.num_parameters())
    second = pyprune.select(now, scores, target_params=target, roles="ffn")
    assert compose(groups, first, second).cuts == out.plan.cuts


def test_a_range_of_layers_holds_for_removal_and_for_widths_under_the_old_numbers() -> None:
    dense = saved_llama()
    out = pyprune.prune(dense, remove_layers=1, layers="2-3", widths={"ffn": 0.5}, calibration=tokens(), copy=True)
    (gone,) = out.plan.details["removed_layers"]
    (stays,) = {2, 3} - {gone}
    cut = {c.group.layer for c in out.plan.cuts if c.group.role == "ffn"}
    assert cut == {stays}


def test_compensation_goes_with_the_widths_after_the_layers() -> None:
    out = pyprune.prune(
        saved_llama(), remove_layers=1, ratio=0.35, criterion="wanda", compensation="least-squares",
        calibration=tokens(),
    )  # fmt: skip
    assert len(out.report.compensation) == 1 and out.model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"remove_layers": 2, "ratio": 0.3}, "remove_layers 2: 2 layers alone are 0.4612 of the parameters"),
        ({"remove_layers": 2, "target_params": 300_000}, "remove_layers 2: 2 layers alone are 0.4612"),
        ({"remove_layers": 4}, "remove_layers 4: is too many: the model has 4 layers, one has to stay"),
        ({"remove_layers": -1}, "remove_layers -1: must be at least 1"),
        ({"remove_layers": "1,2"}, "remove_layers '1,2': must be a whole number or a fraction"),
        ({"remove_layers": 1, "calibration": None}, "calibration: is missing, and layers are chosen on text"),
        ({"remove_layers": 1, "ratio": 0.3, "roles": "ffn,layers"}, "roles: names layers, and remove_layers 1"),
        ({"remove_layers": 1, "widths": {"layers": 2}}, "widths: names layers, and remove_layers 1"),
        ({"remove_layers": 1, "ratio": 0.3, "scores_file": "x"}, "scores_file 'x': are of the whole model"),
        ({"remove_layers": 1, "compensation": "least-squares"}, "compensation 'least-squares': makes up for cuts"),
        ({"remove_layers": 1, "method": "best"}, "method 'best': is for cuts of a ratio"),
        ({"remove_layers": 1, "ratio": 0.95}, "ratio 0.95: kv_heads, ffn can reach at most 0.8"),
        (
            {"remove_layers": 1, "ratio": 0.95, "layer_part": "ffn", "layers": "1-2"},
            "ratio 0.95: leaves 16,027 parameters, and kv_heads, ffn can reach at least",
        ),
        ({"remove_layers": 1, "target_params": 9}, "target_params 9: kv_heads, ffn can reach at least"),
        ({"remove_layers": 1, "layer_criterion": "entropy"}, "layer_criterion 'entropy': is not known"),
        ({"remove_layers": 2, "layers": "1-2", "widths": {"ffn": 9}}, "layers '1-2': holds only layers that remove"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_is_scored(options, line: str, monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("scored")

    monkeypatch.setattr("pyprune.layer_removal.score_layers", never)
    model = saved_llama()
    with pytest.raises(PyPruneError) as told:
        pyprune.prune(model, **{"calibration": tokens(), **options})
    assert str(told.value).startswith(line)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [("criterion", "wanda"), ("route", "gradients"), ("aggregation", "mean"), ("token_weights", "sink"),
     ("score_tokens", 10), ("roles", "ffn"), ("allocation", "descent"), ("allocation_criterion", "group_fisher"),
     ("round_to", 8), ("min_keep", 0.5), ("iterative_steps", 2)],
)  # fmt: skip
def test_an_option_of_widths_is_refused_where_no_width_is_cut(option: str, value) -> None:
    with pytest.raises(PyPruneError, match=f"^{option} .*: says how widths are cut, and no size is asked for"):
        pyprune.prune(saved_llama(), remove_layers=1, calibration=tokens(), **{option: value})
    sized = {"remove_layers": 1, "ratio": 0.3, "calibration": tokens(), "allocation": "knapsack"}
    check_request(PruneConfig.build({**sized, option: value}))


def test_the_recipe_of_a_removal_alone_reads_back(tmp_path) -> None:
    out = pyprune.prune(saved_llama(), remove_layers=1, calibration=tokens(), output_dir=tmp_path / "out")
    again = {**out.recipe.to_dict(), "calibration": tokens(), "output_dir": None}
    check_request(PruneConfig.build(again))


def test_a_profile_that_holds_no_removed_layers_is_refused(monkeypatch) -> None:
    from pyprune.checkpoint.profiles import get_profile

    monkeypatch.setattr(get_profile("hetero-decilm"), "ROLES", ("ffn",))
    with pytest.raises(PyPruneError, match=r"remove_layers 1: removes layers, and profile hetero-decilm holds"):
        pyprune.prune(saved_llama(), remove_layers=1, calibration=tokens(), profile="hetero-decilm")


def test_nothing_is_left_behind_when_a_layer_gives_nan(tmp_path) -> None:
    model = saved_llama()
    real = blocks_of(model)[2].forward
    blocks_of(model)[2].forward = lambda *a, **k: real(*a, **k) * float("nan")
    with pytest.raises(PyPruneError, match=r"model.layers.2'?: gives NaN or infinity"):
        pyprune.prune(model, remove_layers=1, calibration=tokens(), output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"remove_layers": 1}, "remove_layers 1: does not go with stream"),
        ({"ratio": 0.2, "cache": "scores"}, "cache 'scores': does not go with stream"),
        ({"ratio": 0.2, "criterion": "wanda"}, "criterion 'wanda': does not go with stream"),
    ],
)
def test_stream_refuses_what_needs_the_model_in_memory(options, line: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, text = write_model(tmp_path / "m"), write_text(tmp_path / "t.txt")
    with pytest.raises(PyPruneError, match=line):
        pyprune.prune(folder, calibration=text, stream=True, output_dir=tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "t.txt"]

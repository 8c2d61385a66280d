"""The whole line from Python."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers_run import byte_tokenizer, tiny_llama, write_model, write_text

import pyprune
from pyprune import assess, cutting, pipeline
from pyprune.config import EvaluationConfig, InspectConfig, PruneConfig, ScoringConfig
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.schedule import requests
from pyprune.stage_options import SelectConfig
from pyprune.surgery import apply


def tokens(samples: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(3))


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(1) if ids is None else ids).logits


def same_weights(a, b) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_model_object_and_token_ids_are_enough() -> None:
    out = pyprune.prune(tiny_llama(), ratio=0.3, method="plain", calibration=tokens())
    assert type(out.model).__name__ == "LlamaForCausalLM"
    assert out.model.num_parameters() == out.report.parameters["with_embeddings"]["after"]
    assert 1 - out.model.num_parameters() / 320_544 == pytest.approx(0.3, abs=0.005)
    assert logits(out.model).isfinite().all()
    assert out.scores.criterion == "param_first"
    assert out.report.scores["calibration"]["tokens"] == 4 * 32


def test_the_plan_speaks_of_the_dense_model() -> None:
    dense = tiny_llama()
    out = pyprune.prune(copy.deepcopy(dense), ratio=0.3, method="plain", calibration=tokens())
    assert same_weights(apply(dense, out.plan), out.model)


def test_ratio_zero_gives_the_same_bits() -> None:
    expected = logits(tiny_llama())
    out = pyprune.prune(tiny_llama(), ratio=0.0, criterion="l2")
    assert torch.equal(logits(out.model), expected)


def test_two_runs_with_one_seed_give_the_same_bits() -> None:
    one, two = (pyprune.prune(tiny_llama(), ratio=0.3, criterion="random", seed=5).model for _ in range(2))
    assert same_weights(one, two)
    assert not same_weights(one, pyprune.prune(tiny_llama(), ratio=0.3, criterion="random", seed=6).model)


def test_a_given_model_is_used_up_unless_a_copy_is_asked_for() -> None:
    model = tiny_llama()
    expected = logits(model)
    pyprune.prune(model, ratio=0.3, criterion="l2", copy=True)
    assert torch.equal(logits(model), expected)
    pyprune.prune(model, ratio=0.3, criterion="l2")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("allocation", "ratio"),
    [
        ("uniform", 0.5),
        ("global", 0.2),
        pytest.param("uniform", 0.2, marks=pytest.mark.slow),
        pytest.param("global", 0.5, marks=pytest.mark.slow),
    ],
)
def test_steps_compose_into_one_plan_with_the_ratio_asked_for(allocation: str, ratio: float) -> None:
    dense = tiny_llama()
    out = pyprune.prune(
        copy.deepcopy(dense), ratio=ratio, calibration=tokens(), iterative_steps=3, allocation=allocation
    )
    assert out.report.parameters["with_embeddings"]["ratio"] == pytest.approx(ratio, abs=0.005)
    assert out.report.parameters["with_embeddings"]["before"] == 320_544
    assert same_weights(apply(dense, out.plan), out.model)
    asked = {"ratio": ratio, "target_params": None, "widths": None, "iterative_steps": 3}
    assert out.plan.details["asked"] == asked


@pytest.mark.parametrize(
    ("more", "ratio", "left"), [({"iterative_steps": 2}, 0.15, 272_500), ({"remove_layers": 1}, 0.28, 230_800)]
)
def test_a_size_that_is_missed_is_told_as_it_was_asked(more: dict, ratio: float, left: int) -> None:
    options = {"criterion": "l2", "roles": "kv_heads", "calibration": tokens(), **more}
    (note,) = pyprune.prune(tiny_llama(), ratio=ratio, **options).report.warnings
    assert note.startswith(f"ratio {ratio} was asked; the nearest that this way of cutting reaches is 0.")
    (note,) = pyprune.prune(tiny_llama(), target_params=left, **options).report.warnings
    assert note.startswith(f"target_params {left} was asked; the nearest that this way of cutting reaches is ")


def test_every_step_scores_the_model_that_the_one_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = cutting.score

    def watched(model, groups, *rest, **more):
        seen.append(sum(g.units for g in groups.prunable(["ffn"])))
        return real(model, groups, *rest, **more)

    monkeypatch.setattr(cutting, "score", watched)
    out = pyprune.prune(tiny_llama(), ratio=0.4, calibration=tokens(), iterative_steps=2, roles="ffn")
    assert len(seen) == 2
    assert seen[0] == 4 * 192 > seen[1] > 4 * out.plan.details["widths"]["ffn"]
    names = [s["name"] for s in out.report.stages]
    assert [n for n in names if n.startswith("score")] == ["score 1 of 2", "score 2 of 2"]


def test_widths_in_steps_end_at_the_widths_asked_for() -> None:
    out = pyprune.prune(tiny_llama(), widths={"ffn": 0.5, "kv_heads": 2}, criterion="l2", iterative_steps=3)
    assert out.plan.details["widths"] == {"ffn": 96, "kv_heads": 2}
    assert out.model.config.intermediate_size == 96 and out.model.config.num_key_value_heads == 2


def test_requests_fall_linearly_and_end_at_what_was_asked() -> None:
    groups = discover(tiny_llama())
    total = groups.num_parameters()
    asked = list(requests(SelectConfig(ratio=0.3, iterative_steps=3, min_keep=0.25), groups))
    removed = [total - a["target_params"] for a in asked]
    assert removed[-1] == round(0.3 * total)
    assert removed[0] == pytest.approx(removed[-1] / 3, abs=1) and removed[1] == pytest.approx(
        removed[-1] * 2 / 3, abs=1
    )
    assert asked[0]["min_keep"]["ffn"] == 48  # a fraction would shrink with the model
    widths = [a["widths"]["ffn"] for a in requests(SelectConfig(widths={"ffn": 0.5}, iterative_steps=4), groups)]
    assert widths == [168, 144, 120, 96]


def test_one_step_asks_for_exactly_what_the_user_did() -> None:
    (asked,) = requests(SelectConfig(ratio=0.3, layers="1-2", min_keep=0.1), discover(tiny_llama()))
    assert (asked["ratio"], asked["layers"], asked["min_keep"]) == (0.3, "1-2", 0.1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"widths": {"ffn": 0.5}, "allocation": "global", "iterative_steps": 2}, "iterative_steps 2: widths with"),
        ({"ratio": 0.2, "roles": "layers", "layers": "1-2", "iterative_steps": 2}, "iterative_steps 2: whole layers"),
        ({"widths": {"vo_dim": 4}, "iterative_steps": 2}, "iterative_steps 2: vo_dim may leave layers"),
        ({"ratio": 0.2, "scores_file": "s", "iterative_steps": 2}, "iterative_steps 2: scores are made anew"),
        ({"ratio": 0.2, "dtype": "bfloat16"}, "dtype 'bfloat16': is for a model that is opened by its name"),
        ({"ratio": 0.2, "eval_text": "x.txt"}, "eval_text 'x.txt': does not exist"),
        ({"ratio": 0.2, "prompt": "a"}, "prompt 'a': there is no tokenizer"),
        ({"ratio": 0.2, "criterion": "param_first", "calibration": torch.zeros(2, 999, dtype=torch.int64)},
         "length 999: is more than the 256 positions"),
        ({"ratio": 0.99}, "ratio 0.99: kv_heads, ffn can reach at most"),
        ({"ratio": 0.99, "iterative_steps": 2}, "ratio 0.99: kv_heads, ffn can reach at most"),
        ({"target_params": 9, "iterative_steps": 2}, "target_params 9: kv_heads, ffn can reach at least"),
        ({"ratio": 0.2, "cache_limit": 1, "compensation": "obs", "calibration": tokens()},
         "cache_limit 1.0: bounds what compensation keeps in a cache folder, and there is no cache."),
        ({"ratio": 0.2, "cache_limit": 1, "cache": "c"},
         "cache_limit 1.0: bounds what compensation keeps in a cache folder, and there is no compensation."),
        ({"ratio": 0.2, "compensation_target": "stream"},
         "compensation_target 'stream': is what a refit aims at, and compensation none makes none."),
        ({"ratio": 0.2, "compensation_target": "stream", "compensation": "bias", "calibration": tokens()},
         "compensation_target 'stream': is what a refit aims at, and compensation bias makes none."),
        ({"ratio": 0.2, "compensation_target": "stream", "stream": True}, "compensation_target 'stream': is what a"),
        ({"ratio": 0.2, "layers": "9"}, "layers '9': there is no layer 9"),
        ({"rato": 0.2}, "rato: is not an option. Did you mean 'ratio'?"),
        ({}, "ratio: nothing says how much to remove"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_scoring(options: dict, line: str, monkeypatch) -> None:
    monkeypatch.setattr(cutting, "score", lambda *a, **k: pytest.fail("scoring has begun"))
    model = tiny_llama()
    with pytest.raises(PyPruneError) as caught:
        pyprune.prune(model, **{"criterion": "l2", **options})
    assert line in str(caught.value)
    assert not any(p.is_meta for p in model.parameters())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(PyPruneError, match=r"LlamaModel.*has no causal language-model head"):
        pyprune.prune(tiny_llama().model, ratio=0.2, criterion="l2")


def test_a_module_in_two_places_is_refused_before_scoring_where_the_result_is_to_be_saved(
    tmp_path: Path, monkeypatch
) -> None:
    def shared():
        model = tiny_llama()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    options = {"ratio": 0.2, "criterion": "l2"}
    assert pyprune.prune(shared(), **options).model is not None
    monkeypatch.setattr(cutting, "score", lambda *a, **k: pytest.fail("scoring has begun"))
    with pytest.raises(PyPruneError, match=r"layers.1.mlp.*': is one tensor with model.layers.0.mlp"):
        pyprune.prune(shared(), **options, output_dir=tmp_path / "out")
    data = {"data": tokens(40), "cutoff": 32, "bf16": False}
    with pytest.raises(PyPruneError, match=r"layers.1.mlp.*': is one tensor with model.layers.0.mlp"):
        pyprune.recover(shared(), **data, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_given_model_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PyPruneError, match=r"model.layers.0.mlp.up_proj.weight"):
        pyprune.prune(model, ratio=0.2, criterion="l2")


def test_text_with_a_given_model_needs_a_tokenizer(tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "t.txt"))
    with pytest.raises(PyPruneError, match="there is no tokenizer"):
        pyprune.prune(tiny_llama(), ratio=0.2, calibration=text)
    options = {"ratio": 0.2, "criterion": "param_first", "calibration": text, "samples": 2, "length": 32}
    out = pyprune.prune(tiny_llama(), tokenizer=byte_tokenizer(), **options)
    assert out.report.scores["calibration"]["source"] == "t.txt"


def test_the_embeddings_can_be_left_out_of_the_ratio() -> None:
    out = pyprune.prune(tiny_llama(), ratio=0.3, criterion="l2", count_embeddings=False)
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(0.3, abs=0.005)


def test_saved_and_reported(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), str(write_text(tmp_path / "t.txt"))
    out = pyprune.prune(
        model, ratio=0.3, criterion="param_first", calibration=text, samples=2, length=32, eval_text=text,
        eval_length=64, eval_windows=3, prompt="for", max_new_tokens=3, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert torch.equal(logits(pyprune.load(tmp_path / "out")), logits(out.model))
    report = json.loads((tmp_path / "out" / "pyprune_report.json").read_text())
    assert report["output_dir"] == str(tmp_path / "out")
    assert report["perplexity"]["after"]["windows"] == 3
    assert report["continuation"]["prompt"] == "for"
    assert report["parameters"] == out.report.parameters
    assert report["plan"]["widths"] == out.plan.details["widths"]
    assert torch.__version__.startswith(report["versions"]["torch"])
    recipe = PruneConfig.build({}, tmp_path / "out" / "pyprune_recipe.yaml")
    assert recipe.to_dict() == out.recipe.to_dict() == report["recipe"]


def test_evaluation_text_may_be_token_ids() -> None:
    recipe = EvaluationConfig.build({"eval_text": tokens(8, 64), "eval_length": 64})
    result = assess.run(recipe, tiny_llama())
    assert result["perplexity"]["windows"] == 8 and result["perplexity"]["text"] == "token ids"
    json.dumps(result)


def test_score_model_scores_what_prune_would_cut_by_default(tmp_path: Path) -> None:
    recipe = ScoringConfig.build({"criterion": "l2", "output_file": str(tmp_path / "s.safetensors")})
    groups, scores = pipeline.score_model(recipe, tiny_llama())
    assert {groups[name].role for name in scores} == {"kv_heads", "ffn"}
    saved = pyprune.Scores.load(tmp_path / "s.safetensors")
    assert all(torch.equal(saved[name], scores[name]) for name in scores)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_inspecting_finds_what_discovery_finds_in_the_opened_model(tmp_path: Path) -> None:
    name, groups = pipeline.inspect_model(InspectConfig.build({"model_name_or_path": write_model(tmp_path / "m")}))
    assert name == "LlamaForCausalLM"
    assert groups.to_dict() == discover(tiny_llama()).to_dict()


@pytest.mark.parametrize("copy", [False, True])
def test_what_a_cut_would_lose_is_refused_before_weights_change(copy: bool) -> None:
    model = tiny_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.model.layers[0].register_full_backward_pre_hook(lambda module, grads: None)
    with pytest.raises(PyPruneError, match=r"model.layers.0'?:? has 1 hooks"):
        pyprune.prune(
            model, ratio=0.2, criterion="wanda", compensation="least-squares", calibration=tokens(16), copy=copy
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "options"),
    [({"attention_bias": True}, {"allocation": "uniform"}), ({}, {"allocation": "knapsack", "ratio": 0.3})],
    ids=["the same everywhere", "widths by layer"],
)
def test_a_model_that_cannot_be_saved_is_refused_before_weights_change(
    changes: dict[str, bool], options: dict[str, object], tmp_path: Path
) -> None:
    """Llama's configuration class wants a multiple of the head count; its stand-in has no biases, no layers apart."""
    model = tiny_llama(**changes)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PyPruneError, match=r"output_dir.*LlamaConfig refuses.*leave it out"):
        pyprune.prune(
            model, criterion="l2", widths={"hidden": 93}, output_dir=str(tmp_path / "out"), calibration=tokens(),
            **options,
        )  # fmt: skip
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM cannot be saved as it is")
def test_the_report_says_that_another_class_stands_for_the_models_own(tmp_path: Path) -> None:
    out = pyprune.prune(tiny_llama(), criterion="l2", widths={"hidden": 93}, output_dir=str(tmp_path / "out"))
    told = [w for w in out.report.warnings if "saved as MistralForCausalLM, the same network" in w]
    assert len(told) == 1
    assert told[0] in json.loads((tmp_path / "out" / "pyprune_report.json").read_text())["warnings"]

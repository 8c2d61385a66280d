"""A saved folder is complete or absent, and opens as the very model that was saved."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import helpers_surgery as h
import pytest
import torch
from helpers_fresh import PACKAGE, run_fresh
from safetensors import safe_open

from pyprune.checkpoint import atomic, load, save
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery import apply

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(tokens).logits, folder + "/logits.pt")
"""


def small(family: str = "llama", plan=h.uniform, **changes):
    model = h.tiny(family, **changes)
    return apply(model, plan(model))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_plain_transformers_in_a_fresh_process_gives_bit_equal_logits(tmp_path):
    torch.save(h.tokens(), tmp_path / "tokens.pt")
    expected = {}
    for family in h.STOCK:
        model = small(family)
        save(model, None, tmp_path / family)
        expected[family] = h.logits(model)
    model = small("llama", hidden_size=40)  # a head count that Llama's own configuration refuses
    with pytest.warns(UserWarning, match="saved as MistralForCausalLM"):
        save(model, None, tmp_path / "odd")
    expected["odd"] = h.logits(model)
    done = run_fresh(FRESH, "tokens.pt", *expected, cwd=tmp_path)
    assert done.status == 0, done.err
    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), logits), name


@pytest.mark.parametrize("family", h.FAMILIES)
@pytest.mark.parametrize("plan", [h.uniform, h.ragged], ids=["uniform", "per layer"])
def test_load_gives_bit_equal_logits_and_the_same_generated_tokens(tmp_path, family, plan):
    model = small(family, plan)
    save(model, None, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(h.logits(loaded), h.logits(model))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(h.tokens(5), **options), model.generate(h.tokens(5), **options))


@pytest.mark.parametrize("family", h.FAMILIES)
def test_plain_transformers_stops_at_per_layer_widths(tmp_path, family):
    from transformers import AutoModelForCausalLM

    save(small(family, h.ragged), None, tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "pyprune.load" in (tmp_path / "out/README.md").read_text()


def test_a_loaded_model_is_saved_again_unchanged(tmp_path):
    for plan in (h.uniform, h.ragged):
        first, second = tmp_path / f"{plan.__name__}1", tmp_path / f"{plan.__name__}2"
        save(small("llama", plan), None, first)
        save(load(first), None, second)
        assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_narrow_layers_survive_saving(tmp_path, family):
    from pyprune.discovery import discover

    model = h.tiny(family)
    groups = [g for g in discover(model) if g.role in ("vo_dim", "ffn", "kv_heads")]
    model = apply(model, Plan(tuple(h.cut(g, g.units // 2) for g in groups)))
    save(model, None, tmp_path / "out")
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))


@pytest.mark.filterwarnings("ignore:No .* expresses")
def test_a_stand_in_has_the_narrow_layers_and_the_gaps_of_the_model(tmp_path):
    from pyprune.discovery import discover
    from pyprune.selection.layers import removable, without

    model = h.tiny("llama", num_key_value_heads=8, num_attention_heads=8, head_dim=6)
    groups = discover(model)
    model = apply(model, without(groups, removable(groups, 1, None, "ffn", model.config)[0], [1]))
    cuts = [h.cut(g, {"kv_heads": 7, "vo_dim": 4}[g.role]) for g in discover(model) if g.role in ("kv_heads", "vo_dim")]
    model = apply(model, Plan(tuple(cuts)))
    assert model.config.pyprune_narrow and model.config.pyprune_skipped
    with pytest.warns(UserWarning, match="saved as MistralForCausalLM"):
        save(model, None, tmp_path / "out")
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))


def test_widths_that_a_class_without_stand_in_refuses_become_per_layer_ones(tmp_path):
    model = small("llama", hidden_size=40, attention_bias=True)
    assert model.config.is_heterogeneous
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, None, tmp_path / "out")
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))


def test_a_head_width_that_equals_the_class_default_is_written_out(tmp_path):
    model = h.tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    model = apply(model, h.uniform_plan(h.groups_of(model), kv_heads=2))
    save(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == 128


def test_types_and_ties_survive_saving(tmp_path):
    model = h.tiny("llama", tie_word_embeddings=True)
    model.tie_weights()
    model = apply(model.to(torch.bfloat16), h.uniform(model))
    save(model, None, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert load(tmp_path / "out", dtype="float32").dtype == torch.float32


def test_large_models_are_sharded(tmp_path):
    model = small("llama")
    save(model, None, tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))


def test_the_folder_holds_plan_report_recipe_tokenizer_and_a_card(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    model = h.tiny("llama")
    plan = h.ragged(model)
    report = {
        "model": "owner/base",
        "parameters": {"with_embeddings": {"before": 100, "after": 80, "ratio": 0.2}},
        "weights_bytes": {"before": 4_000_000, "after": 3_000_000},
        "perplexity": {
            "before": {"perplexity": 20.0},
            "after": {"perplexity": 24.5, "protocol": "wikitext, windows of 8"},
        },
    }
    folder = save(apply(model, plan), tokenizer, tmp_path / "out", plan=plan, report=report, recipe={"ratio": 0.2})
    assert Plan.from_json((folder / "pyprune_plan.json").read_text()).cuts == plan.cuts
    assert json.loads((folder / "pyprune_report.json").read_text()) == report
    assert (folder / "pyprune_recipe.yaml").read_text() == "ratio: 0.2\n"
    assert (folder / "tokenizer.json").is_file() and (folder / "generation_config.json").is_file()
    card = (folder / "README.md").read_text()
    for piece in (
        "base_model: owner/base",
        "| 3 | 1 of 4 | 1 of 2 | 25 of 40 |",
        "| perplexity | 20.00 | 24.50 |",
        "ratio: 0.2",
    ):
        assert piece in card


def test_files_can_be_read_by_others(tmp_path):
    folder = save(small(), None, tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(PyPruneError, match=r"out.*exists already.*overwrite"):
        save(small(), None, tmp_path / "out")
    assert everything(tmp_path) == {"out/mine.txt": b"mine"}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(PyPruneError, match="is a file"):
            save(small(), None, tmp_path / "out", overwrite=overwrite)


def test_overwrite_replaces_the_whole_folder(tmp_path):
    save(small(), None, tmp_path / "out")
    (tmp_path / "out/old.txt").write_text("old")
    model = small("qwen2")
    save(model, None, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/old.txt").exists()
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Interruption:
    """Lets ``count`` writes through and then raises."""

    def __init__(self, error: BaseException, count: int, original):
        self.error, self.left, self.original = error, count, original

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.original(*arguments, **options)


FAILURES = {
    "interrupt": (KeyboardInterrupt(), KeyboardInterrupt),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), PyPruneError),
    "full disk in safetensors": (RuntimeError("I/O error: No space left on device (os error 28)"), PyPruneError),
    "input/output error": (OSError(errno.EIO, "Input/output error"), OSError),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new folder", "overwrite"])
@pytest.mark.parametrize("written", [0, 2])
def test_a_failing_write_leaves_what_was_there_and_no_debris(tmp_path, monkeypatch, failure, overwrite, written):
    error, expected = FAILURES[failure]
    if overwrite:
        save(small("qwen2"), None, tmp_path / "out")
    before = everything(tmp_path)
    from transformers import modeling_utils

    writer = Interruption(error, written, modeling_utils.safe_save_file)
    monkeypatch.setattr(modeling_utils, "safe_save_file", writer)
    with pytest.raises(expected) as caught:
        save(small(), None, tmp_path / "out", overwrite=overwrite, max_shard_size="50KB")
    if expected is PyPruneError:
        assert "disk is full" in str(caught.value) and caught.value.option == "folder"
    assert everything(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


@pytest.mark.parametrize("step", ["sync", "rename", "second rename"])
def test_a_failure_at_the_very_end_leaves_the_old_folder(tmp_path, monkeypatch, step):
    save(small("qwen2"), None, tmp_path / "out")
    before = everything(tmp_path)
    if step == "sync":
        monkeypatch.setattr(atomic, "sync", Interruption(KeyboardInterrupt(), 0, None))
    else:
        real, count = os.rename, int(step == "second rename")

        class Once(Interruption):
            def __call__(self, *arguments):
                self.left -= 1
                if self.left == -1:
                    raise self.error
                return self.original(*arguments)

        monkeypatch.setattr(os, "rename", Once(KeyboardInterrupt(), count, real))
    with pytest.raises(KeyboardInterrupt):
        save(small(), None, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert everything(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_made_on_the_way_go_with_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "sync", Interruption(KeyboardInterrupt(), 0, None))
    with pytest.raises(KeyboardInterrupt):
        save(small(), None, tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PyPruneError, match=r"976.6 KiB left and 30.\d MiB are needed"):
        save(small(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_folder_under_the_final_name(tmp_path):
    code = (
        "import os\n"
        "import helpers_surgery as h\n"
        "from pyprune.checkpoint import atomic, save\n"
        "atomic.sync = lambda _: os.kill(os.getpid(), 9)\n"
        "save(h.tiny('llama'), None, 'out')\n"
    )
    done = run_fresh(code, cwd=tmp_path, path=(PACKAGE, Path(__file__).parents[1]))
    assert done.status == -9, done.err
    assert not (tmp_path / "out").exists()


def test_a_used_up_model_is_not_saved(tmp_path):
    model = h.tiny("llama")
    apply(model, Plan())
    with pytest.raises(PyPruneError, match="weights that are not in memory"):
        save(model, None, tmp_path / "out")


SHARED = {
    "a layer": "model.layers.1",
    "an FFN": "model.layers.1.mlp",
    "an attention": "model.layers.1.self_attn",
    "a matrix": "model.layers.1.mlp.down_proj",
    "a norm": "model.layers.1.input_layernorm",
}


@pytest.mark.parametrize("path", SHARED.values(), ids=SHARED)
def test_a_module_that_stands_in_two_places_is_named(tmp_path, path):
    model = h.tiny("llama")
    model.set_submodule(path, model.get_submodule(path.replace("1", "0")))
    with pytest.raises(PyPruneError, match=rf"model '{path}.*': is one tensor with model.layers.0.* has two in their"):
        save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_views_of_one_tensor_are_seen_and_the_ties_of_the_class_are_kept(tmp_path):
    model = h.tiny("llama", tie_word_embeddings=True)
    model.tie_weights()
    assert torch.equal(h.logits(load(save(model, None, tmp_path / "tied"))), h.logits(model))
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data
    with pytest.raises(PyPruneError, match=r"layers.1.mlp.up_proj.weight': is one tensor with model.layers.0.mlp.up_p"):
        save(model, None, tmp_path / "out")

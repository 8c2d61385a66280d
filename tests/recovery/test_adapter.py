"""Adapters: where they go, what merging does, and which model they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import helpers_surgery as h
import pytest
import torch
from helpers_recovery import LORA, logits, shake, small_llama
from safetensors.torch import load_file, save_file

from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.recovery import adapter
from pyprune.recovery.adapter import Lora, adapted
from pyprune.selection.plan import Plan
from pyprune.surgery import apply
from pyprune.surgery.narrow import NarrowConv1D, NarrowLinear


def per_layer_widths():
    model = h.tiny("llama")
    return apply(model, h.ragged(model))


def resized():
    model = h.tiny("gpt2")
    return apply(model, h.ragged(model))


def narrow(family: str):
    model = h.tiny(family)
    groups = [g for g in discover(model) if g.role == "vo_dim"]
    return apply(model, Plan(tuple(h.cut(g, g.units // 2) for g in groups)))


def narrow_llama():
    return narrow("llama")


def narrow_gpt2():
    return narrow("gpt2")


MODELS = [small_llama, per_layer_widths, resized, narrow_llama, narrow_gpt2]


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize("build", MODELS)
def test_the_merged_model_computes_what_model_and_adapter_computed(build) -> None:
    model = build()
    classes = {name: type(m) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    dense = logits(model)
    with adapted(model, LORA, 0) as wrapped:
        assert torch.allclose(logits(wrapped), dense, atol=1e-5)  # B is zero
        shake(wrapped)
        unmerged = logits(wrapped)
        adapter.merge(wrapped)
    assert (unmerged - dense).abs().max() > 0.05
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize(("build", "kind"), [(narrow_llama, NarrowLinear), (narrow_gpt2, NarrowConv1D)])
def test_narrow_layers_get_adapters_on_their_matrices(build, kind) -> None:
    model = build()
    narrows = [name for name, m in model.named_modules() if isinstance(m, kind)]
    assert narrows
    with adapted(model, LORA, 0) as wrapped:
        names = list(adapter.state(wrapped))
    for name in narrows:
        assert any(f"{name}.matrix.lora_A" in n for n in names), name


def test_without_merging_the_model_is_bit_for_bit_as_it_was() -> None:
    model = small_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyError), adapted(model, LORA, 0) as wrapped:
        shake(wrapped)
        raise KeyError
    assert {n for n in before} == set(model.state_dict())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_all_linear_layers_of_the_blocks_get_one_and_the_head_does_not() -> None:
    model = small_llama(tie_word_embeddings=False)
    paths = adapter.targets_of(model, "all-linear")
    assert len(paths) == 2 * 7 and not any("lm_head" in p for p in paths)


def test_only_the_adapter_trains() -> None:
    model = small_llama()
    with adapted(model, LORA, 0) as wrapped:
        assert all("lora_" in n for n in adapter.state(wrapped))
        assert len(adapter.state(wrapped)) == 2 * 7 * 2
        assert sum(p.requires_grad for p in model.parameters()) == 2 * 7 * 2


def test_named_targets_get_one_by_last_name_or_by_path() -> None:
    model = small_llama()
    assert adapter.targets_of(model, "q_proj, v_proj") == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"
    ]
    assert adapter.targets_of(model, "layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    with adapted(model, Lora(2, 4, 0.0, "layers.1.mlp.up_proj"), 0) as wrapped:
        assert len(adapter.state(wrapped)) == 2


def test_a_target_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(PyPruneError, match=r"lora_targets 'c_attn': is no linear layer.*down_proj, gate_proj, k_proj"):
        adapter.targets_of(small_llama(), "q_proj,c_attn")


def test_the_seed_decides_the_adapter_and_the_callers_random_numbers_go_on() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        with adapted(small_llama(), LORA, seed) as wrapped:
            found.append(next(iter(adapter.copied(adapter.state(wrapped)).values())))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def kept(model, folder: Path, base: str = "base") -> Path:
    """An adapter of ``model`` in a folder; the model is left as it is."""
    identity = adapter.fingerprint(model)
    with adapted(model, LORA, 0) as wrapped:
        shake(wrapped)
        files = adapter.files_of(wrapped, base, identity)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.filterwarnings("ignore:No .* expresses")
@pytest.mark.parametrize("build", MODELS)
def test_a_kept_adapter_merged_later_gives_the_same_model(build, tmp_path) -> None:
    model = build()
    with adapted(model, LORA, 0) as wrapped:
        shake(wrapped)
        files = adapter.files_of(wrapped, "base", "")
        wanted = logits(wrapped)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / adapter.IDENTITY).unlink()
    adapter.merge_adapter(model, str(tmp_path))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in n or "matrix" in n for n, _ in model.named_parameters())


def test_an_adapter_of_peft_itself_is_merged(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    model = small_llama()
    theirs = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wanted = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    adapter.merge_adapter(model, str(tmp_path))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_for_other_weights_is_refused(tmp_path) -> None:
    folder = kept(small_llama(seed=0), tmp_path / "a", base="the/original")
    with pytest.raises(PyPruneError, match=r"adapter.*other weights. It belongs to the/original"):
        adapter.merge_adapter(small_llama(seed=1), str(folder))


def test_an_adapter_for_other_widths_is_refused_and_nothing_is_changed(tmp_path) -> None:
    folder = kept(small_llama(), tmp_path / "a")
    (folder / adapter.IDENTITY).unlink()
    model = small_llama(intermediate_size=40)
    before = logits(model)
    with pytest.raises(PyPruneError, match=r"made for another model: model.layers.0.mlp.* is 32 x 40 here, not of 48"):
        adapter.merge_adapter(model, str(folder))
    assert torch.equal(logits(model), before)


def test_an_adapter_with_more_layers_is_refused(tmp_path) -> None:
    folder = kept(small_llama(num_hidden_layers=3), tmp_path / "a")
    (folder / adapter.IDENTITY).unlink()
    with pytest.raises(PyPruneError, match=r"made for another model: this one has no layer model.layers.2"):
        adapter.merge_adapter(small_llama(), str(folder))


def test_what_is_no_adapter_is_refused(tmp_path) -> None:
    with pytest.raises(PyPruneError, match="does not exist"):
        adapter.check_adapter(tmp_path / "absent")
    with pytest.raises(PyPruneError, match="is no adapter folder"):
        adapter.check_adapter(tmp_path)
    folder = kept(small_llama(), tmp_path / "a")
    settings = json.loads((folder / adapter.SETTINGS).read_text())
    (folder / adapter.SETTINGS).write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(PyPruneError, match="of kind IA3, not LORA"):
        adapter.check_adapter(folder)
    (folder / adapter.WEIGHTS).unlink()
    with pytest.raises(PyPruneError, match=r"has no adapter_model\.safetensors"):
        adapter.check_adapter(folder)


def test_a_damaged_adapter_is_refused(tmp_path) -> None:
    folder = kept(small_llama(), tmp_path / "a")
    (folder / adapter.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(PyPruneError, match="cannot be read"):
        adapter.merge_adapter(small_llama(), str(folder))


def test_the_fingerprint_sees_a_change_of_any_matrix_and_not_the_type() -> None:
    model = small_llama().bfloat16()
    base = adapter.fingerprint(model)
    assert adapter.fingerprint(model.float()) == base
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert adapter.fingerprint(model) != base


def test_tensors_of_another_adapter_are_not_put_in(tmp_path) -> None:
    with adapted(small_llama(), LORA, 0) as wrapped:
        save_file(adapter.copied(adapter.state(wrapped)), tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")
    with adapted(small_llama(), Lora(4, 8, 0.0, "q_proj"), 0) as wrapped, pytest.raises(ValueError, match="another"):
        adapter.put(wrapped, held)

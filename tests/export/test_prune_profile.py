"""`prune --profile`: the cut keeps to widths that the profile holds, and is saved in it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_families import build
from helpers_run import byte_tokenizer, tiny_llama
from safetensors import safe_open

import pyprune
from pyprune.config import PruneConfig
from pyprune.errors import PyPruneError
from pyprune.preflight import check_request
from pyprune.surgery.skeleton import is_stock


def wide(**changes):
    return tiny_llama(**{"intermediate_size": 1024, **changes})


def test_decilm_cuts_ffn_in_multiples_of_256_and_no_head(tmp_path) -> None:
    out = pyprune.prune(
        wide(), ratio=0.3, criterion="l2", allocation="global", profile="hetero-decilm", output_dir=tmp_path / "out"
    )
    assert {c.group.role for c in out.plan.cuts} == {"ffn"}
    assert {c.width % 256 for c in out.plan.cuts} == {0}
    config = json.loads((tmp_path / "out/config.json").read_text())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        widths = [file.get_slice(f"model.layers.{i}.mlp.up_proj.weight").get_shape()[0] for i in range(4)]
    read = [-(-int(2 * b["ffn"]["ffn_mult"] * 96 / 3) // 256) * 256 for b in config["block_configs"]]
    assert read == widths
    assert out.recipe.to_dict()["round_to"] == {"ffn": 256}
    assert {"pyprune_plan.json", "pyprune_report.json", "README.md"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_gguf_gives_a_folder_with_one_file_and_the_records(tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    out = pyprune.prune(
        tiny_llama(), ratio=0.3, criterion="l2", allocation="global", profile="gguf", output_dir=tmp_path / "out"
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    records = {"pyprune_plan.json", "pyprune_report.json", "pyprune_recipe.yaml", "pyprune_importance.json"}
    assert names == {"model.gguf", "README.md", "report.html", *records}
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    for i, layer in enumerate(out.model.model.layers):
        assert list(tensors[f"blk.{i}.ffn_up.weight"].shape)[::-1] == list(layer.mlp.up_proj.weight.shape)
    assert "llama-cli -m model.gguf" in (tmp_path / "out/README.md").read_text()
    assert out.report.weights_bytes["after"] == (tmp_path / "out/model.gguf").stat().st_size


def test_hetero_hf_and_uniform_are_saved_in_their_form(tmp_path) -> None:
    options = {"ratio": 0.3, "criterion": "l2"}
    pyprune.prune(tiny_llama(), allocation="global", profile="hetero-hf", output_dir=tmp_path / "h", **options)
    assert (tmp_path / "h/modeling_pyprune.py").is_file()
    out = pyprune.prune(tiny_llama(), profile="uniform", output_dir=tmp_path / "u", **options)
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "u")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, out.model(ids).logits)


@pytest.mark.parametrize("family", ["OPT", "Mixtral"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_without_a_profile_a_modelling_file_is_written_where_the_widths_want_one(family, allocation, tmp_path) -> None:
    # On the way, widths are tried that scores alone do not come to, and these may be of the other kind.
    out = pyprune.prune(
        build(family, tmp_path), ratio=0.2, criterion="l2", allocation=allocation, output_dir=tmp_path / "out"
    )
    wanted = not is_stock(out.model.config)
    assert (tmp_path / "out/modeling_pyprune.py").is_file() == wanted == (out.recipe.save.profile == "hetero-hf")
    assert not [w for w in out.report.warnings if "opens" in w]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"profile": "uniform", "allocation": "global"},
            r"allocation 'global': gives layers different widths.*uniform",
        ),
        ({"profile": "uniform", "layers": "1-2"}, r"layers '1-2': would differ from the others"),
        (
            {"profile": "hetero-decilm", "roles": "kv_heads,ffn"},
            r"roles 'kv_heads': is cut, .*holds cuts of ffn, layers",
        ),
        ({"profile": "hetero-decilm", "widths": "kv_heads=2"}, r"widths 'kv_heads': is cut"),
        ({"profile": "hetero-decilm", "round_to": 300}, r"round_to 300: is no multiple of 256.* Use 512"),
        ({"profile": "gguf", "roles": "vo_dim"}, r"roles 'vo_dim': is cut, and profile gguf"),
    ],
)
def test_requests_that_contradict_the_profile_are_refused_before_anything_is_opened(options, message) -> None:
    asked = {"ratio": 0.2, "criterion": "l2", **options}
    if "widths" in options:
        del asked["ratio"]
    with pytest.raises(PyPruneError, match=message):
        check_request(PruneConfig.build(asked))


def test_a_model_that_the_profile_cannot_hold_is_refused_before_scoring(tmp_path, monkeypatch) -> None:
    from pyprune import cutting

    monkeypatch.setattr(cutting, "score", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(PyPruneError, match=r"holds FFN widths that are multiples of 256, and layer 0 has 320"):
        pyprune.prune(
            wide(intermediate_size=320), widths={"layers": 3}, criterion="l2", profile="hetero-decilm",
            output_dir=tmp_path / "out",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_before_scoring(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    from pyprune import cutting

    monkeypatch.setattr(cutting, "score", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(PyPruneError, match=r"tokenizer 'BPE': has no counterpart in llama.cpp: it has no merges"):
        pyprune.prune(
            tiny_llama(), tokenizer=byte_tokenizer(), ratio=0.2, criterion="l2", profile="gguf",
            output_dir=tmp_path / "out",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []

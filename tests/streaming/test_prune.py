"""From folder to folder: the same bytes as pruning in memory, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_run import pyprune as command
from helpers_run import tiny_llama
from helpers_streaming import contents

import pyprune
from pyprune.errors import PyPruneError
from pyprune.streaming import run
from pyprune.streaming.workspace import Workspace, workspace_path


def both(model: Path, where: Path, **options):
    memory = pyprune.prune(str(model), output_dir=str(where / "memory"), **options)
    disk = pyprune.prune(str(model), output_dir=str(where / "disk"), stream=True, **options)
    return memory, disk


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.3, "criterion": "param_first", "max_shard_size": "300KB"},
        {"ratio": 0.3, "criterion": "l2", "allocation": "global"},
        {"widths": {"ffn": 96, "layers": 3}, "criterion": "l2"},
        {"ratio": 0.2, "roles": ["hidden", "ffn"], "criterion": "param_first"},
        {"ratio": 0.2, "criterion": "l1", "dtype": "bfloat16"},
    ],
    ids=["shards", "widths by layer", "layers", "hidden", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore:LlamaForCausalLM cannot be saved as it is")
def test_the_folder_is_the_one_that_pruning_in_memory_writes_byte_for_byte(sharded, text, tmp_path, options) -> None:
    reads = options["criterion"] == "param_first"
    more = {"calibration": str(text), "samples": 4, "length": 32} if reads else {}
    memory, disk = both(sharded, tmp_path, **options, **more)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
    assert {f.name for f in (tmp_path / "disk").iterdir()} == {f.name for f in (tmp_path / "memory").iterdir()}
    assert disk.plan.to_json() == memory.plan.to_json()
    assert disk.report.parameters == memory.report.parameters
    assert disk.report.weights_bytes == memory.report.weights_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "gemma2", "qwen2"])
def test_other_families_give_the_same_bytes(tmp_path, kind) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "n_layer": 2, "num_hidden_layers": 2,
        "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 101,
        "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    known = AutoConfig.for_model(kind)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{k: v for k, v in sizes.items() if hasattr(known, k)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 101, (3, 16), generator=torch.Generator().manual_seed(1))
    memory, disk = both(tmp_path / "model", tmp_path, widths={"ffn": 0.5}, criterion="param_first", calibration=ids)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
    for name, scores in memory.scores.items():
        torch.testing.assert_close(disk.scores[name], scores, rtol=1e-5, atol=1e-5 * float(scores.max()))


@pytest.mark.slow
def test_the_command_line_streams_and_stock_transformers_opens_the_result(sharded, text, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "smaller"
    ended = command(
        "prune", str(sharded), "--stream", "--ratio", "0.3", "--calibration", str(text), "--samples", "2",
        "--length", "32", "--output_dir", str(out), "--json",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == report["parameters"]["with_embeddings"]["after"]
    assert report["recipe"]["stream"] is True
    assert report["scores"]["engine"] == "block sweep from disk"


def test_a_scores_file_is_used(sharded, text, tmp_path) -> None:
    first = pyprune.prune(
        str(sharded), ratio=0.3, method="plain", calibration=str(text), samples=2, length=32,
        output_dir=tmp_path / "a",
    )  # fmt: skip
    first.scores.save(tmp_path / "scores.safetensors")
    scores = str(tmp_path / "scores.safetensors")
    again = pyprune.prune(str(sharded), ratio=0.3, scores_file=scores, stream=True, output_dir=tmp_path / "b")
    assert again.plan.to_json() == first.plan.to_json()
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_text": __file__}, "eval_text"),
        ({"prompt": "Once"}, "prompt"),
        ({"profile": "uniform"}, "profile"),
        ({"iterative_steps": 2}, "iterative_steps"),
        ({"activation_memory": 64.0}, "activation_memory"),
        ({"compensation": "least-squares", "calibration": torch.zeros(4, 8, dtype=torch.long)}, "compensation"),
        ({"allocation_criterion": "group_fisher", "calibration": torch.zeros(4, 8).long()}, "allocation_criterion"),
        ({"score_tokens": 64}, "score_tokens"),
        ({"output_dir": None}, "output_dir"),
    ],
)
def test_what_needs_the_model_in_memory_is_refused_by_name(sharded, tmp_path, options, named) -> None:
    given = {"ratio": 0.3, "criterion": "l2", "stream": True, "output_dir": str(tmp_path / "out"), **options}
    with pytest.raises(PyPruneError) as error:
        pyprune.prune(str(sharded), **given)
    assert error.value.option == named
    assert not list(tmp_path.iterdir())


def test_no_samples_go_with_stream(sharded, tmp_path) -> None:
    out = tmp_path / "out"
    pyprune.prune(str(sharded), ratio=0.3, criterion="l2", stream=True, generations=0, output_dir=str(out))
    assert (out / "model.safetensors.index.json").exists() or (out / "model.safetensors").exists()


def test_a_model_object_and_a_name_on_the_hub_are_refused(tmp_path) -> None:
    options = {"ratio": 0.3, "criterion": "l2", "stream": True, "output_dir": str(tmp_path / "out")}
    with pytest.raises(PyPruneError, match="in memory"):
        pyprune.prune(tiny_llama(), **options)
    with pytest.raises(PyPruneError, match="Download the model first"):
        pyprune.prune("somebody/some-model", **options)


def damaged(sharded: Path, folder: Path) -> Path:
    shutil.copytree(sharded, folder)
    return folder


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(PyPruneError) as error:
        pyprune.prune(str(folder), ratio=0.3, criterion="l2", stream=True, output_dir=str(out))
    assert not out.exists() and not workspace_path(out).exists()
    return str(error.value)


def test_a_missing_shard_is_named(sharded, tmp_path) -> None:
    folder = damaged(sharded, tmp_path / "model")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(folder, tmp_path / "out")


def test_a_shard_that_is_cut_short_is_named(sharded, tmp_path) -> None:
    folder = damaged(sharded, tmp_path / "model")
    short = sorted(folder.glob("*.safetensors"))[1]
    short.write_bytes(short.read_bytes()[:-100])
    assert f"{short.name} is cut short" in refused(folder, tmp_path / "out")


def test_pickles_are_refused(tmp_path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert "pickle" in refused(tmp_path / "model", tmp_path / "out")


def test_tensors_of_other_names_or_shapes_are_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, file)
    assert f"among them {name}" in refused(tmp_path / "model", tmp_path / "out")
    save_file({**whole, name: whole[name][:-1].clone()}, file)
    assert f"{name} has shape [191, 96]" in refused(tmp_path / "model", tmp_path / "out")


def test_a_damaged_weight_is_refused_and_nothing_is_left(tmp_path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("inf")  # l2 does not read it: slicing finds it
    model.save_pretrained(tmp_path / "model")
    assert "model.norm.weight has 1 weights" in refused(tmp_path / "model", tmp_path / "out")


def test_too_little_room_is_refused_before_any_work(sharded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "_stream_bytes", lambda disk, batches: 10**18)
    assert "iB are needed" in refused(sharded, tmp_path / "out")


def test_a_full_disk_is_said_in_one_line_and_finished_work_is_kept(sharded, tmp_path, monkeypatch) -> None:
    out, before = tmp_path / "out", Workspace.save

    def full(self, name, *arguments):
        if name == "sums/000009":
            raise OSError(28, "No space left on device")
        before(self, name, *arguments)

    options = {"ratio": 0.3, "criterion": "l2", "stream": True, "output_dir": str(out)}
    monkeypatch.setattr(Workspace, "save", full)
    with pytest.raises(PyPruneError, match=r"disk is full.*finished layers are kept") as error:
        pyprune.prune(str(sharded), **options)
    assert error.value.option == "output_dir" and not out.exists()
    assert (workspace_path(out) / "sums" / "000008.safetensors").is_file()
    monkeypatch.setattr(Workspace, "save", before)
    pyprune.prune(str(sharded), **options)
    assert out.is_dir() and not workspace_path(out).exists()


def test_layers_that_will_differ_are_tried_as_layers_that_differ(sharded, text, tmp_path, monkeypatch) -> None:
    seen = []

    def stop(disk, trial):
        seen.append({c.width for c in trial.cuts if c.group.role == "ffn"})
        raise PyPruneError("plan", None, "enough")

    monkeypatch.setattr(run, "Slicer", stop)
    options = {"ratio": 0.3, "criterion": "param_first", "calibration": str(text), "samples": 4, "length": 32}
    for allocation, alike in (("knapsack", False), ("uniform", True)):
        with pytest.raises(PyPruneError, match="enough"):
            pyprune.prune(str(sharded), output_dir=str(tmp_path / "o"), stream=True, allocation=allocation, **options)
        assert (len(seen[-1]) == 1) is alike

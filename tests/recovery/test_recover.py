"""The whole line: from a pruned folder and text to a folder of the same kind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers_recovery import logits, sentences, small_llama
from helpers_run import byte_tokenizer, tiny_llama

from pyprune import load, prune, recover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan

QUICK = {"data": sentences(80), "cutoff": 64, "lora_r": 4, "val_tokens": 300, "learning_rate": 5e-3, "bf16": False}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A pruned model's folder, the same widths in every layer."""
    folder = tmp_path_factory.mktemp("pruned") / "smaller"
    prune(tiny_llama(), tokenizer=byte_tokenizer(), ratio=0.3, criterion="l2", output_dir=folder)
    return folder


def quick(model, **changes):
    if not isinstance(model, (str, Path)):
        changes.setdefault("tokenizer", byte_tokenizer())
    return recover(model, **{**QUICK, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_pruned_folder_becomes_a_better_one_that_plain_transformers_opens(pruned, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = quick(pruned, output_dir=tmp_path / "out")
    figures = out.report["validation"]
    assert figures["after"]["nll"] < figures["before"]["nll"] - 0.3
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened), logits(out.model))
    assert {n: p.shape for n, p in opened.named_parameters()} == {
        n: p.shape for n, p in load(pruned).named_parameters()
    }
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(byte_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_plan_report_recipe_and_card_are_carried_on_and_extended(pruned, tmp_path) -> None:
    quick(pruned, output_dir=tmp_path / "out", eval_text=torch.arange(256) % 97, protocol="llm-pruner")
    out = tmp_path / "out"
    plans = [Plan.from_json((f / "pyprune_plan.json").read_text()) for f in (pruned, out)]
    assert plans[0].cuts == plans[1].cuts and plans[0].cuts
    before, after = (json.loads((f / "pyprune_report.json").read_text()) for f in (pruned, out))
    recovery = after.pop("recovery")
    assert after == before
    assert (out / "pyprune_recipe.yaml").read_bytes() == (pruned / "pyprune_recipe.yaml").read_bytes()
    assert yaml.safe_load((out / "pyprune_recover.yaml").read_text())["lora_r"] == 4
    assert recovery["validation"]["best_step"] > 0 and recovery["perplexity"]["after"]["tokens"] == 2 * 127
    assert recovery["perplexity"]["after"]["name"] == "llm-pruner"
    card = (out / "README.md").read_text()
    for piece in (
        "made from `LlamaForCausalLM` by structural pruning",
        "## What was cut",
        "## Recovery",
        "LoRA of rank 4",
        "validation perplexity",
    ):
        assert piece in card, piece


def test_per_layer_widths_are_recovered_and_opened_by_load(tmp_path) -> None:
    options = {"ratio": 0.3, "criterion": "l2", "allocation": "global", "output_dir": tmp_path / "smaller"}
    prune(tiny_llama(), tokenizer=byte_tokenizer(), **options)
    assert "per_layer_config" in (tmp_path / "smaller/config.json").read_text()
    out = quick(tmp_path / "smaller", output_dir=tmp_path / "out")
    assert out.report["validation"]["after"]["nll"] < out.report["validation"]["before"]["nll"] - 0.3
    assert torch.equal(logits(load(tmp_path / "out")), logits(out.model))
    configs = [json.loads((tmp_path / f / "config.json").read_text())["per_layer_config"] for f in ("smaller", "out")]
    assert configs[0] == configs[1]


def test_a_folder_with_a_modelling_file_stays_one_that_plain_transformers_opens(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    options = {"ratio": 0.3, "criterion": "l2", "allocation": "global", "profile": "hetero-hf"}
    prune(tiny_llama(), tokenizer=byte_tokenizer(), output_dir=tmp_path / "smaller", **options)
    out = quick(tmp_path / "smaller", output_dir=tmp_path / "out", keep_adapter=True)
    assert out.report["validation"]["best_step"] > 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(opened.eval()), logits(out.model))
    before, after = (files(tmp_path / name) for name in ("smaller", "out"))
    assert after["modeling_pyprune.py"] == before["modeling_pyprune.py"]
    assert "trust_remote_code=True" in after["README.md"].decode()
    assert json.loads(after["config.json"])["pyprune_build"] == json.loads(before["config.json"])["pyprune_build"]
    recover(tmp_path / "smaller", adapter=tmp_path / "out" / "adapter", output_dir=tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)


def test_so_does_one_of_the_hub(tmp_path, monkeypatch) -> None:
    place = tmp_path / "models--somebody--smaller"
    options = {"ratio": 0.3, "criterion": "l2", "allocation": "global", "profile": "hetero-hf"}
    prune(tiny_llama(), tokenizer=byte_tokenizer(), output_dir=place / "snapshots" / "0a1b", **options)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    quick("somebody/smaller", output_dir=tmp_path / "out")
    assert "pyprune_build" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "modeling_pyprune.py").is_file()


def test_a_folder_without_a_modelling_file_gets_none(pruned, tmp_path) -> None:
    plain = load(pruned)
    plain.save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    quick(tmp_path / "plain", output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_pyprune.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_resized_modules_are_recovered(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    prune(dense, tokenizer=byte_tokenizer(), ratio=0.2, criterion="l2", output_dir=tmp_path / "smaller")
    out = quick(tmp_path / "smaller", output_dir=tmp_path / "out")
    assert out.report["validation"]["after"]["nll"] < out.report["validation"]["before"]["nll"] - 0.03
    assert torch.equal(logits(load(tmp_path / "out")), logits(out.model))


def test_a_model_object_is_trained_in_place_and_nothing_is_saved_unless_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_llama()
    before = logits(model)
    out = quick(model)
    assert out.model is model and not torch.equal(logits(model), before)
    assert not any("lora" in n for n, _ in model.named_parameters()) and not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_the_validation_figure_is_that_of_the_merged_weights() -> None:
    out = quick(small_llama(), val_data=[{"text": "red green blue house over stone"}])
    text = "red green blue house over stone</s>"
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(out.model(ids).logits[0, :-1], ids[0, 1:])
    assert out.report["validation"]["after"]["nll"] == pytest.approx(float(nll), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_never_rises_and_a_useless_training_changes_no_bit(dtype) -> None:
    model = small_llama().to(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    other = [{"text": "{}~|" * 8} for _ in range(60)]
    out = quick(model, data=other, val_data=sentences(10), learning_rate=0.05)
    figures = out.report["validation"]
    assert figures["best_step"] == 0 and figures["after"] == figures["before"]
    assert min(v["nll"] for v in out.history.validations[1:]) > figures["before"]["nll"]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert "Nothing better" in out.report["what"]


def test_weights_that_rounding_makes_worse_come_back_bit_for_bit(monkeypatch) -> None:
    from pyprune.recovery import adapter

    real = adapter.merge

    def merge_badly(wrapped):
        real(wrapped)
        for module in wrapped.modules():
            if hasattr(module, "lora_A"):
                module.get_base_layer().weight.data.fill_(torch.nan)

    monkeypatch.setattr(adapter, "merge", merge_badly)
    model = small_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    out = quick(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert out.report["validation"]["after"] == out.report["validation"]["before"]
    assert any("were no better" in w for w in out.report["warnings"])


@pytest.mark.parametrize("moment", ["merge", "validation"])
def test_an_interrupted_merge_leaves_the_model_that_came(monkeypatch, moment: str) -> None:
    from peft.tuners.lora.layer import Linear

    from pyprune.recovery.train import Trainer

    merge, nll = Linear.merge, Trainer.nll
    merged = []

    def merging(self, *arguments, **options):
        merge(self, *arguments, **options)
        merged.append(self)
        if moment == "merge" and len(merged) == 5:
            raise KeyboardInterrupt

    def measuring(self):
        if merged:
            raise KeyboardInterrupt
        return nll(self)

    monkeypatch.setattr(Linear, "merge", merging)
    monkeypatch.setattr(Trainer, "nll", measuring)
    model = small_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        quick(model)
    assert len(merged) >= 5 and before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_training_goes_on_in_the_type_in_which_it_was_begun(pruned, tmp_path, monkeypatch) -> None:
    from pyprune.recovery.train import Trainer

    real = Trainer._step

    def step(self, *arguments):
        if self.history.step == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    options = {"output_dir": tmp_path / "out", "eval_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", step)
        quick(pruned, dtype="bfloat16", **options)
    with pytest.raises(PyPruneError, match="begun otherwise: dtype was bfloat16 and is float32"):
        quick(pruned, dtype="float32", resume=True, **options)


def test_a_kept_adapter_merged_into_the_pruned_model_gives_the_recovered_one(pruned, tmp_path) -> None:
    quick(pruned, output_dir=tmp_path / "out", keep_adapter=True)
    recover(pruned, adapter=tmp_path / "out" / "adapter", output_dir=tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(load(tmp_path / "out")), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "A LoRA adapter was merged" in card


def test_an_adapter_is_refused_by_another_model_and_nothing_is_written(pruned, tmp_path) -> None:
    quick(pruned, output_dir=tmp_path / "out", keep_adapter=True)
    before = files(tmp_path)
    with pytest.raises(PyPruneError, match=r"adapter.*other weights"):
        recover(tmp_path / "out", adapter=tmp_path / "out" / "adapter", output_dir=tmp_path / "merged")
    assert files(tmp_path) == before


def test_a_model_that_would_mix_documents_gets_one_in_each_row() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4))
    out = quick(model)
    assert "would mix documents" in out.report["warnings"][0]
    assert out.report["data"][0]["rows"] + out.report["data"][0]["held_out"] == 80
    assert out.report["validation"]["after"]["nll"] < out.report["validation"]["before"]["nll"]


def test_token_ids_are_trained_on_without_a_tokenizer() -> None:
    ids = torch.arange(64 * 30).reshape(30, 64) % 50
    out = recover(small_llama(), **{**QUICK, "data": ids})
    assert out.report["validation"]["after"]["nll"] < out.report["validation"]["before"]["nll"]


def test_llm_pruners_setting_is_its_paper_s() -> None:
    model = small_llama()
    data = [{"instruction": f"{i}", "input": "", "output": "yes"} for i in range(130)]
    out = quick(model, data=data, preset="llm-pruner", lora_r=None, learning_rate=None, cutoff=256, bf16=None)
    recipe = out.recipe
    assert (recipe.adapter.lora_r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (8, 16, 0.05)
    assert (recipe.train.learning_rate, recipe.train.train_batch_size, recipe.train.epochs) == (1e-4, 64, 2)
    assert set(recipe.adapter.lora_targets.split(",")) == {
        f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert recipe.data.cutoff == 256 and not recipe.data.packing
    assert out.report["steps"] == 4  # 117 records twice, 64 at a time


def test_a_full_disk_while_saving_leaves_no_folder_and_keeps_the_training(pruned, tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(PyPruneError, match=r"output_dir.*the disk is full; nothing was written"):
            quick(pruned, output_dir=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.unfinished"]
    out = quick(pruned, output_dir=tmp_path / "out", resume=True)
    assert out.history.step == len(out.report["losses"]) and (tmp_path / "out" / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_too_small_a_disk_is_refused_before_training(pruned, tmp_path, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr("pyprune.recovery.train.Trainer.run", lambda *a: pytest.fail("training has begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(PyPruneError, match=r"output_dir.*MiB are needed"):
        quick(pruned, output_dir=tmp_path / "out")


def test_an_unfinished_training_is_begun_anew_with_overwrite(pruned, tmp_path) -> None:
    (tmp_path / "out.unfinished" / "step-000005").mkdir(parents=True)
    with pytest.raises(PyPruneError, match="holds an unfinished training"):
        quick(pruned, output_dir=tmp_path / "out")
    quick(pruned, output_dir=tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_sequence_is_512_tokens_or_as_long_as_the_model_allows() -> None:
    assert quick(small_llama(), cutoff=None).report["cutoff"] == 256
    longer = small_llama(max_position_embeddings=1024)
    assert quick(longer, cutoff=None).report["cutoff"] == 512
    with pytest.raises(PyPruneError, match=r"cutoff 300: is more than the 256 positions"):
        quick(small_llama(), cutoff=300)


def test_the_rate_falls_with_the_width_of_the_model_unless_one_is_given() -> None:
    from pyprune.recover_preflight import usual_rate

    assert usual_rate(small_llama()) == 2e-3
    assert usual_rate(small_llama(hidden_size=1024)) == 1 / 1024
    assert quick(small_llama(), learning_rate=None).report["learning_rate"] == 2e-3
    assert quick(small_llama()).report["learning_rate"] == QUICK["learning_rate"]


def test_without_peft_the_way_to_install_it_is_told(monkeypatch) -> None:
    from pyprune import recover_preflight

    monkeypatch.setattr(recover_preflight, "find_spec", lambda name: None)
    with pytest.raises(PyPruneError, match=r"needs the package peft. pip install 'pyprune\[recovery\]'"):
        quick(small_llama())


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(PyPruneError, match=r"data: holds token id 300, and the model's vocabulary has 258"):
        recover(small_llama(), **{**QUICK, "data": torch.full((20, 16), 300)})


def test_the_same_command_twice_gives_the_same_bytes(pruned, tmp_path) -> None:
    for name in ("a", "b"):
        quick(pruned, output_dir=tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_saved_files_hold_no_pickle(pruned, tmp_path) -> None:
    quick(pruned, output_dir=tmp_path / "out", keep_adapter=True)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {
        ".json", ".yaml", ".md", ".safetensors", ".jinja", ".html", ".py",
    }  # fmt: skip


def test_a_sequence_has_as_many_tokens_as_the_model_has_positions_by_whatever_name() -> None:
    import transformers as t

    from pyprune.config import RecoverConfig
    from pyprune.recover_preflight import cutoff_of

    model = t.MptForCausalLM(t.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=97, max_seq_len=32))
    assert cutoff_of(RecoverConfig.build({"data": "d.txt"}), model) == 32
    assert cutoff_of(RecoverConfig.build({"data": "d.txt"}), tiny_llama()) == 256

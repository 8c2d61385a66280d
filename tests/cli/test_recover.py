"""``pyprune recover`` from the command line: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers_run import byte_tokenizer, refused, tiny_llama, write_model

TRAIN = ("recover", "model", "--data", "train.txt", "--cutoff", "64", "--lora_r", "4", "--val_tokens", "512")


def test_the_tables_show_before_and_after_and_the_way_there(call, place) -> None:
    ended = call(
        *TRAIN, "--epochs", "0.3", "--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "2",
        "--prompt", "for", "--max_new_tokens", "4", "--output_dir", "out",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    for part in (
        "LoRA of rank 4 on train.txt", "validation", "evaluation text", "Validations", "learned tokens a second",
        "2 windows of 64 tokens", "What the models say", "saved in",
    ):  # fmt: skip
        assert part in ended.out, part
    assert ended.err == ""


def test_json_is_the_report_and_the_folder_holds_it(call, place) -> None:
    ended = call(*TRAIN, "--epochs", "0.3", "--output_dir", "out", "--json")
    report = json.loads(ended.out)
    assert report["validation"]["after"]["nll"] < report["validation"]["before"]["nll"]
    assert len(report["losses"]) == report["steps"] and report["stages"][-1]["name"] == "save"
    saved = json.loads((place / "out" / "pyprune_report.json").read_text())["recovery"]
    assert saved["losses"] == report["losses"]


def test_a_recipe_file_and_the_saved_recipe_repeat_the_run(call, place) -> None:
    (place / "r.yaml").write_text("data: {train.txt: 3, test.txt: 1}\ncutoff: 64\nlora_r: 4\nepochs: 0.1\nratio: 0.2\n")
    assert call("recover", "model", "--config", "r.yaml", "--output_dir", "one").status == 0
    saved = str(place / "one" / "pyprune_recover.yaml")
    assert call("recover", "--config", saved, "--output_dir", "two").status == 0
    assert (place / "one/model.safetensors").read_bytes() == (place / "two/model.safetensors").read_bytes()


def test_a_named_recipe_yields_to_the_file_and_the_file_to_flags(call, place) -> None:
    (place / "r.yaml").write_text("preset: llm-pruner\nlora_r: 6\ncutoff: 128\n")
    ended = call(*TRAIN[:4], "--config", "r.yaml", "--cutoff", "64", "--epochs", "0.2", "--json")
    recipe = json.loads(ended.out)["recipe"]
    assert [recipe[k] for k in ("lora_alpha", "lora_r", "cutoff", "epochs")] == [16, 6, 64, 0.2]


def test_a_profile_is_no_option_of_recover_and_one_file_still_serves_every_verb(call, place) -> None:
    line = refused(call, place, *TRAIN, "--profile", "gguf")
    assert "No such option" in line and "--profile" in line
    (place / "r.yaml").write_text("profile: gguf\nratio: 0.2\noutput_dir: out\n")
    ended = call(*TRAIN, "--config", "r.yaml", "--epochs", "0.2", "--json")
    recipe = json.loads(ended.out)["recipe"]
    assert recipe["output_dir"] == "out" and "profile" not in recipe
    assert (place / "out" / "model.safetensors").is_file() and not (place / "out" / "model.gguf").exists()
    (place / "s.yaml").write_text("profil: gguf\n")
    assert "unknown key 'profil'" in refused(call, place, *TRAIN, "--config", "s.yaml")


def test_nothing_to_learn_from(call, place) -> None:
    assert "--data: there is nothing to learn from. Give a file or a dataset" in refused(
        call, place, "recover", "model"
    )


def test_a_missing_file_before_the_model_is_opened(call, place) -> None:
    line = refused(call, place, "recover", "nowhere", "--data", "absent.jsonl")
    assert "--data 'absent.jsonl': does not exist." in line


@pytest.mark.parametrize("option", ["checkpoint_dir", "distill_cache", "val_data", "eval_text"])
def test_what_is_kept_or_read_in_the_output_folder(call, place, option: str) -> None:
    shutil.copytree(place / "model", place / "out")
    kept = "out/inner" if option in ("checkpoint_dir", "distill_cache") else "out/inner.txt"
    if kept.endswith(".txt"):
        (place / kept).write_text("text\n")
    teacher = ("--teacher", "model") if option == "distill_cache" else ()
    line = refused(call, place, *TRAIN, *teacher, f"--{option}", kept, "--output_dir", "out", "--overwrite")
    assert f"--{option} '{kept}': lies in the output folder, out" in line and (place / "out/config.json").exists()


def test_the_model_as_the_output_folder(call, place) -> None:
    line = refused(call, place, *TRAIN, "--output_dir", "model", "--overwrite")
    assert "model_name_or_path 'model': is the output folder, model" in line and (place / "model/config.json").exists()


def test_records_without_the_fields_name_file_line_and_fields(call, place) -> None:
    (place / "d.jsonl").write_text('{"text": "a"}\n{"question": "b"}\n')
    line = refused(call, place, "recover", "model", "--data", "d.jsonl", "--output_dir", "out")
    assert "--data 'd.jsonl (line 2)': has none of the fields that are known. It has: question." in line


def test_empty_data(call, place) -> None:
    (place / "d.jsonl").write_text("\n")
    line = refused(call, place, "recover", "model", "--data", "d.jsonl", "--output_dir", "out")
    assert "--data 'd.jsonl': holds no records." in line


def test_an_output_that_exists(call, place) -> None:
    (place / "out").mkdir()
    line = refused(call, place, *TRAIN, "--output_dir", "out")
    assert "--output_dir 'out': exists already. Set overwrite" in line


def test_a_teacher_with_another_vocabulary(call, place) -> None:
    tiny_llama(vocab_size=300).save_pretrained(place / "dense")
    byte_tokenizer().save_pretrained(place / "dense")
    line = refused(call, place, *TRAIN, "--teacher", "dense", "--output_dir", "out")
    assert "--teacher 'dense': has a vocabulary of 300 tokens, and the model one of 258." in line


def test_a_teacher_that_is_not_there(call, place) -> None:
    assert "--teacher" in refused(call, place, *TRAIN, "--teacher", "./absent", "--output_dir", "out")


def test_a_folder_that_is_no_adapter(call, place) -> None:
    line = refused(call, place, "recover", "model", "--adapter", "model", "--output_dir", "out")
    assert "--adapter 'model': is no adapter folder. Name a folder with adapter_config.json" in line


def test_an_adapter_of_another_model(call, place) -> None:
    assert call(*TRAIN, "--epochs", "0.2", "--keep_adapter", "--output_dir", "one").status == 0
    write_model(place / "other", seed=1)
    line = refused(call, place, "recover", "other", "--adapter", "one/adapter", "--output_dir", "out")
    assert "--adapter 'one/adapter': was trained on a model with other weights. It belongs to model." in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--adapter", "a"), "--adapter 'a': merges an adapter that is there, while data trains a new one."),
        (("--resume",), "--resume: needs a folder that holds checkpoints. Give output_dir."),
        (("--keep_adapter",), "--keep_adapter: needs a folder to save in. Give output_dir."),
        (("--distill_cache", "c"), "--distill_cache 'c': there is no teacher."),
        (("--distill_weight", "0.3"), "--distill_weight 0.3: there is no teacher. Give teacher too."),
        (("--checkpoint_dir", "test.txt/c"), "test.txt/c': cannot be made: there is a file in its place."),
        (
            ("--lora_targets", "c_attn", "--output_dir", "out"),
            "--lora_targets 'c_attn': is no linear layer of the model",
        ),
        (("--cutoff", "300"), "--cutoff 300: is more than the 256 positions that the model knows."),
        (("--preset", "llm-prunner"), "--preset 'llm-prunner': is not known. Did you mean 'llm-pruner'?"),
        (("--lora_dropout", "1"), "--lora_dropout '1': must be at least 0 and below 1."),
        (("--distill_weight", "1.5"), "--distill_weight 1.5: must be a number from 0 to 1."),
        (("--max_minutes", "0"), "--max_minutes 0: must be a number above 0."),
        (("--max_tokens", "few"), "--max_tokens 'few': must be a number of tokens."),
        (("--data", "train.txt=2,test.txt"), "must be files or dataset names. Write FILE,FILE or FILE=3,FILE=1"),
        (("--data", "train.txt=-1"), "must be files or dataset names."),
    ],
)
def test_options_that_cannot_be_met(call, place, options: tuple[str, ...], said: str) -> None:
    assert said in refused(call, place, *TRAIN, *options).replace("'0'", "0").replace("'1.5'", "1.5")


def test_the_progress_line_is_not_drawn_into_a_file(call, place) -> None:
    assert call(*TRAIN, "--epochs", "0.2", "--output_dir", "out").err == ""


def test_that_nothing_will_be_saved_is_said_before_the_work(call, place) -> None:
    assert call(*TRAIN, "--epochs", "0.1").err == "note: no output_dir: nothing will be saved\n"
    assert call(*TRAIN, "--epochs", "0.1", "-q").err == ""


def test_answers_that_nobody_would_see_are_refused(call, place) -> None:
    assert "--generations 1: is for the report, which lies in output_dir." in refused(
        call, place, *TRAIN, "--generations", "1"
    )


def test_the_log_of_a_run_can_be_read_while_it_goes_on(call, place, monkeypatch) -> None:
    from pyprune.recovery.unfinished import Unfinished

    seen: list[dict] = []
    monkeypatch.setattr(Unfinished, "log", lambda self, entry: seen.append(dict(entry)))
    report = json.loads(call(*TRAIN, "--epochs", "0.2", "--output_dir", "out", "--json").out)
    assert [e["loss"] for e in seen if "loss" in e] == report["losses"]
    assert [e["validation"] for e in seen if "validation" in e] == [v["nll"] for v in report["validations"]]
    assert not Path(place.root / "out.unfinished").exists()

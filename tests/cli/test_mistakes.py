"""Bad input: exit status 2, one line that names option, value and way out, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_fresh import PACKAGE, pyprune_fresh, run_fresh
from helpers_run import refused, tiny_llama
from safetensors.torch import load_file, save_file

PRUNE = ("prune", "model", "--calibration", "train.txt", "--samples", "2", "--length", "32", "--output_dir", "out")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_ratio_of_one_or_more(call, place) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "1.2")
    assert "--ratio 1.2: must be at least 0 and below 1." in line


def test_a_ratio_in_percent_is_understood_and_refused(call, place) -> None:
    assert "--ratio 20: must be at least 0 and below 1. Did you mean 0.2?" in refused(call, place, *PRUNE, "--ratio=20")


def test_a_ratio_with_a_percent_sign_is_understood_and_refused(call, place) -> None:
    assert "--ratio '20%': must be a number. Did you mean 0.2?" in refused(call, place, *PRUNE, "--ratio", "20%")


@pytest.mark.parametrize("word", ["attention", "heads"])
def test_words_for_heads_lead_to_their_roles(call, place, word: str) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--roles", word)
    assert f"--roles '{word}': is not known. Heads are kv_heads and query_heads. Known: " in line


def test_widths_are_shown_as_they_are_written(call, place) -> None:
    line = refused(call, place, *PRUNE, "--criterion", "l2", "--widths", "ffn=5000")
    assert "--widths ffn=5000: model.layers.0.mlp:ffn has only 192 units." in line


def test_a_role_of_fixed_width_is_no_way_to_a_ratio_that_is_out_of_reach(call, place) -> None:
    line = refused(call, place, *PRUNE, "--criterion", "l2", "--ratio", "0.6", "--widths", "ffn=0.9")
    assert "allow more roles (query_heads" in line and "ffn" not in line


def test_several_files_where_one_source_is_read(call, place) -> None:
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--calibration", "train.txt,test.txt")
    assert "--calibration 'train.txt,test.txt': names several files, and is one source. Join the files first." in line


@pytest.mark.parametrize(("option", "named"), [("calibration", "text_field"), ("eval_text", "eval_text_field")])
def test_records_without_text_name_the_option_for_their_field(call, place, option: str, named: str) -> None:
    command = (
        ("eval", "model", "--eval_length", "64") if option == "eval_text" else ("prune", "model", "--ratio", "0.2")
    )
    (place / "r.jsonl").write_text('{"body": "words"}\n')
    assert f"It has: body. Name it with {named}." in refused(call, place, *command, f"--{option}", "r.jsonl")
    for value, kind in (("3", "a number"), ("null", "null"), ("[1]", "a list")):
        (place / "r.jsonl").write_text(f'{{"text": {value}}}\n')
        line = refused(call, place, *command, f"--{option}", "r.jsonl")
        assert f"the field 'text' holds {kind}, not text." in line


def test_a_ratio_below_zero(call, place) -> None:
    assert "--ratio -0.1: must be" in refused(call, place, *PRUNE, "--ratio=-0.1")


def test_nothing_says_how_much(call, place) -> None:
    line = refused(call, place, *PRUNE)
    assert "--ratio: nothing says how much to remove. Give ratio, target_params, widths or remove_layers." in line


def test_a_ratio_that_the_roles_cannot_reach_is_refused_before_scoring(call, place, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.cutting.score", lambda *a, **k: pytest.fail("scoring has begun"))
    line = refused(call, place, *PRUNE, "--ratio", "0.9", "--roles", "ffn", "--layers", "0")
    assert "--ratio 0.9: ffn can reach at most" in line and "more layers" in line


def test_an_unknown_criterion(call, place) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--criterion", "param_frist")
    assert "--criterion 'param_frist': is not known. Did you mean 'param_first'?" in line


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [("aggregation", "summ", "sum"), ("allocation", "unifrom", "uniform"), ("roles", "fn", "ffn")],
)
def test_other_unknown_names(call, place, option: str, value: str, nearest: str) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", f"--{option}", value)
    assert f"--{option} '{value}': is not known. Did you mean '{nearest}'?" in line


def test_tokens_for_an_allocation_criterion_that_is_not_named(call, place) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--criterion", "l2", "--allocation_tokens", "256")
    assert "--allocation_tokens 256: is for a criterion that is not named" in line


@pytest.mark.parametrize("allocation", ["uniform", "log_depth", "divergence"])
@pytest.mark.parametrize("more", [(), ("--method", "best")], ids=["plain", "best"])
def test_a_criterion_for_an_allocation_that_reads_no_scores(call, place, allocation: str, more) -> None:
    options = ("--ratio", "0.2", "--allocation", allocation, "--allocation_criterion", "l2", *more)
    line = refused(call, place, "prune", "model", "--calibration", "train.txt", *options)
    assert f"--allocation_criterion 'l2': says how much each layer loses, and allocation {allocation} reads no" in line


def test_text_too_short_for_the_samples(call, place) -> None:
    line = refused(
        call,
        place,
        "prune",
        "model",
        "--ratio",
        "0.2",
        "--calibration",
        "test.txt",
        "--samples",
        "1000",
        "--length",
        "64",
    )
    assert (
        "--calibration 'test.txt': has 4" in line
        and "1000 samples of 64 need 64000. Ask for at most samples=62" in line
    )


def test_text_too_short_for_the_windows(call, place) -> None:
    line = refused(
        call, place, "eval", "model", "--eval_text", "test.txt", "--eval_length", "256", "--eval_windows", "99"
    )
    assert "--eval_windows 99: is more than test.txt holds: 15 windows of 256 tokens. Ask for at most 15" in line


def test_a_text_that_is_not_there(call, place) -> None:
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--calibration", "absent.txt")
    assert "--calibration 'absent.txt': does not exist" in line
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--eval_text", "absent.txt")
    assert "--eval_text 'absent.txt': does not exist" in line


def test_no_text_for_a_criterion_that_needs_it(call, place) -> None:
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--method", "plain")
    assert "--calibration: is missing, and criterion param_first is measured on text" in line and "l1, l2" in line


def test_weights_with_nan(call, place) -> None:
    file = place / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert (
        "--model_name_or_path 'model'" in line and "model.layers.1.mlp.up_proj.weight" in line and "not finite" in line
    )


def test_a_model_class_without_a_causal_head(call, place) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5Model"], "d_model": 8})
    )
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "--model_name_or_path 'model'" in line and "T5Model" in line and "causal" in line
    assert config["model_type"] == "llama"


def test_a_checkpoint_without_the_heads_weights(call, place) -> None:
    shutil.rmtree(place / "model")
    tiny_llama(tie_word_embeddings=False).model.save_pretrained(place / "model")
    assert "has no causal language-model head" in refused(call, place, *PRUNE, "--ratio", "0.2")


def test_an_output_folder_that_exists(call, place) -> None:
    (place / "out").mkdir()
    (place / "out" / "precious").write_text("data")
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "--output_dir 'out': exists already. Set overwrite" in line


def test_an_output_folder_that_cannot_be_made(call, place) -> None:
    (place / "file").write_text("")
    line = refused(call, place, *PRUNE[:-1], "file/out", "--ratio", "0.2")
    assert "--output_dir 'file/out'" in line


def test_a_disk_without_room_is_noticed_before_scoring(call, place, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.cutting.score", lambda *a, **k: pytest.fail("scoring has begun"))
    full = shutil.disk_usage(place.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "--output_dir" in line and "the disk has 1000 B left" in line


def test_a_disk_that_fills_up_while_saving(call, place, monkeypatch) -> None:
    def full(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyprune.checkpoint.atomic.sync", full)
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--criterion", "l2")
    assert "--output_dir" in line and "the disk is full" in line


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_while_saving_leaves_what_was_there(
    call, place, monkeypatch, number: int, status: int, word: str
) -> None:
    (place / "out").mkdir()
    for name in ("config.json", "precious"):
        (place / "out" / name).write_text("data")
    before = place.files()
    monkeypatch.setattr("pyprune.checkpoint.atomic.sync", lambda folder: os.kill(os.getpid(), number))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs behind them without it
    try:
        ended = call(*PRUNE, "--ratio", "0.2", "--criterion", "l2", "--overwrite")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert (ended.status, ended.out, ended.err) == (status, "", f"error: {word}\n")
    assert place.files() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), ""),
        (("--stream",), " The same command goes on."),
        (("--allocation", "search", "--samples", "8"), " The same command goes on."),
    ],
    ids=["plain", "stream", "search"],
)
def test_an_interrupted_prune_says_whether_it_goes_on(call, place, monkeypatch, more, said: str) -> None:
    monkeypatch.setattr("pyprune.pipeline.run", interrupt)
    ended = call(*PRUNE, "--ratio", "0.2", "--criterion", "l2", *more)
    assert (ended.status, ended.err) == (130, f"error: interrupted{said and '.'}{said}\n")


def test_an_interrupted_recover_says_how_it_goes_on_once_there_is_something(call, place, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.recover_pipeline.run", interrupt)
    command = ("recover", "model", "--data", "train.txt", "--output_dir", "out")
    assert call(*command).err == "error: interrupted\n"
    (place / "out.unfinished").mkdir()
    said = f"The same command with --resume goes on from {place / 'out.unfinished'}."
    assert call(*command).err == f"error: interrupted. {said}\n"


def test_an_interrupted_run_says_that_it_goes_on(call, place, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.runs.run_recipe", interrupt)
    assert call("run", "recipe.yaml").err == "error: interrupted. The same command goes on.\n"


def test_an_interrupt_during_the_first_imports_is_one_line_too(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pyprune.cli.prune': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from pyprune.__main__ import main\n"
        "raise SystemExit(main())"
    )
    ended = run_fresh(script, cwd=tmp_path, path=(PACKAGE,))
    assert (ended.status, ended.out, ended.err) == (130, "", "error: interrupted\n")


def test_a_missing_shard(call, place) -> None:
    shutil.rmtree(place / "model")
    tiny_llama().save_pretrained(place / "model", max_shard_size="200KB")
    shards = sorted((place / "model").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "shards are missing" in line and shards[1].name in line


def test_a_checkpoint_in_a_pickle_only(call, place) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    (place / "model" / "model.safetensors").unlink()
    torch.save(weights, place / "model" / "pytorch_model.bin")
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "pickle" in line and "pytorch_model.bin" in line


def test_a_model_that_is_not_there(call, place) -> None:
    line = refused(call, place, "prune", "./absent", "--ratio", "0.2", "--criterion", "l2")
    assert "--model_name_or_path './absent'" in line


def test_no_model_at_all(call, place) -> None:
    for verb in (("prune", "--ratio", "0.2", "--criterion", "l2"), ("inspect",), ("eval", "--eval_text", "test.txt")):
        assert "--model_name_or_path: no model is given" in refused(call, place, *verb)


def test_the_model_given_twice(call, place) -> None:
    line = refused(call, place, "inspect", "model", "--model_name_or_path", "other")
    assert "given twice" in line


def test_windows_longer_than_the_models_positions(call, place) -> None:
    line = refused(call, place, "eval", "model", "--eval_text", "test.txt", "--eval_length", "512")
    assert "--eval_length 512: is more than the 256 positions that the model knows. Use 256." in line


def test_a_device_that_is_not_there(call, place) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--device", "cuda:77")
    assert "--device 'cuda:77'" in line and "pyprune env" in line


def test_nothing_to_evaluate_on(call, place) -> None:
    assert "--eval_text: there is nothing to measure on" in refused(call, place, "eval", "model")


def test_scores_of_another_model(call, place) -> None:
    save_file({"x": torch.zeros(1, 3)}, place / "s.safetensors", metadata={"criterion": "l2", "details": "{}"})
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--scores_file", "s.safetensors")
    assert line.startswith("error: --scores_file 's.safetensors': no scores for ")
    assert line.endswith("Make one of this model, with these roles: pyprune score --output_file.\n")
    streamed = refused(call, place, *PRUNE, "--ratio", "0.2", "--scores_file", "s.safetensors", "--stream")
    assert streamed.startswith("error: --scores_file 's.safetensors': no scores for ")
    (place / "t.safetensors").write_text("not scores")
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--scores_file", "t.safetensors")
    assert "--scores_file 't.safetensors': is not a file of scores" in line
    line = refused(call, place, "prune", "model", "--ratio", "0.2", "--scores_file", "u.safetensors")
    assert "--scores_file 'u.safetensors': is not there" in line


def test_a_file_of_scores_that_exists(call, place) -> None:
    (place / "s.safetensors").write_text("precious")
    line = refused(call, place, "score", "model", "--criterion", "l2", "--output_file", "s.safetensors")
    assert "--output_file 's.safetensors': exists already" in line


def test_an_unknown_flag_and_an_unknown_verb(call, place) -> None:
    assert "No such option '--rato'" in refused(call, place, "prune", "model", "--rato", "0.2")
    assert "No such command 'prnue'. Did you mean 'prune'?" in refused(call, place, "prnue", "model")


def test_a_recipe_with_an_unknown_key(call, place) -> None:
    (place / "r.yaml").write_text("rato: 0.2\n")
    line = refused(call, place, *PRUNE, "--config", "r.yaml")
    assert "--config 'r.yaml': has the unknown key 'rato'. Did you mean 'ratio'?" in line


def test_the_status_of_the_process_is_2(place) -> None:
    ended = pyprune_fresh("prune", "model", "--ratio", "1.2", cwd=place.root)
    assert (ended.status, ended.out) == (2, "")
    problem = "error: --ratio 1.2: must be at least 0 and below 1."
    assert ended.err == f"{problem} Give the fraction of parameters to remove, as 0.2.\n"


@pytest.mark.parametrize(("option", "more"), [("cache", ()), ("search_file", ("--allocation", "search"))])
def test_what_is_kept_in_the_output_folder(call, place, option: str, more: tuple[str, ...]) -> None:
    line = refused(call, place, *PRUNE, "--ratio", "0.2", "--criterion", "wanda", *more, f"--{option}", "out/kept")
    assert f"--{option} 'out/kept': lies in the output folder, out" in line


@pytest.mark.parametrize("option", ["scores_file", "prompts", "eval_text"])
def test_what_is_read_from_the_output_folder(call, place, option: str) -> None:
    shutil.copytree(place / "model", place / "out")
    (place / "out/kept").write_text("text\n")
    calibration = () if option == "scores_file" else ("--criterion", "wanda")
    line = refused(call, place, *PRUNE, "--ratio", "0.2", *calibration, f"--{option}", "out/kept", "--overwrite")
    assert f"--{option} 'out/kept': lies in the output folder, out" in line and (place / "out/kept").exists()


@pytest.mark.parametrize(
    ("options", "missing"),
    [(("--eval_windows", "3"), "eval_text"), (("--protocol", "1024"), "eval_text"), (("--eval_bos",), "eval_text"),
     (("--samples", "3"), "calibration"), (("--bos",), "calibration")],
)  # fmt: skip
def test_what_is_said_of_something_that_is_not_given(call, place, options: tuple[str, ...], missing: str) -> None:
    ended = call("prune", "model", "--ratio", "0.2", "--criterion", "l2", "--output_dir", "out", *options)
    assert ended.status == 2 and f"is for option {missing}, which is not given. Give {missing} too" in ended.err


def test_a_model_in_the_output_folder(call, place) -> None:
    shutil.copytree(place / "model", place / "model/inner")
    ended = call("prune", "model/inner", "--ratio", "0.2", "--criterion", "l2", "--output_dir", "model", "--overwrite")
    assert ended.status == 2 and "lies in the output folder, model" in ended.err
    assert (place / "model/inner/config.json").exists()


def test_the_model_as_the_output_folder(call, place) -> None:
    before = (place / "model/config.json").read_text()
    ended = call("prune", "model", "--ratio", "0.2", "--criterion", "l2", "--output_dir", "./model", "--overwrite")
    assert ended.status == 2 and "model_name_or_path 'model': is the output folder, ./model. Name another" in ended.err
    assert (place / "model/config.json").read_text() == before


def test_the_hub_is_not_asked_offline(call, place, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(call, place, "prune", "nowhere", "--ratio", "0.2", "--criterion", "l2")
    assert "'nowhere': is no local folder, and the hub is not asked, because HF_HUB_OFFLINE is set." in line


def test_a_folder_that_holds_a_gguf_file(call, place) -> None:
    (place / "smaller").mkdir()
    (place / "smaller/model.gguf").write_bytes(b"")
    line = refused(call, place, "eval", "smaller", "--eval_text", "test.txt")
    assert "'smaller': has no config.json. Name its GGUF file: smaller/model.gguf." in line
    line = refused(call, place, "inspect", "smaller/model.gguf")
    assert "is not a folder. Make one of a GGUF file: `pyprune export FILE.gguf --output FOLDER`." in line


def test_chat_names_the_models_place(call, place) -> None:
    assert "MODEL './nosuch': does not exist" in refused(call, place, "chat", "./nosuch", "--prompt", "x")


def test_token_ids_of_another_tokenizer(call, place) -> None:
    np.save(place / "big.npy", np.full((6, 16), 3000))
    line = refused(call, place, "prune", "model", "--ratio", "0.1", "--calibration", "big.npy")
    assert "holds token id 3000, and the model's vocabulary has" in line


def test_a_configuration_with_an_unknown_activation(call, place) -> None:
    file = place / "model/config.json"
    file.write_text(file.read_text().replace('"silu"', '"nonsense"'))
    line = refused(call, place, *PRUNE, "--ratio", "0.2")
    assert "cannot be opened: KeyError: 'nonsense'" in line

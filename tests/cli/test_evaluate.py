"""``pyprune eval``: protocols, tasks, speed, comparison, and the result file."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from helpers_run import tiny_llama
from helpers_tasks import records, trained_tokenizer, write_task
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.evaluation.loglikelihood import loglikelihoods
from pyprune.evaluation.perplexity import perplexity
from pyprune.evaluation.tasks import accuracy, read_task, requests_of

SPEED = ("--speed", "--speed_prompt", "16", "--speed_tokens", "4", "--speed_rounds", "2")


@pytest.fixture
def task(place):
    return write_task(place / "quiz.jsonl.gz", records(16))


def refused(call, place, *arguments: str) -> str:
    before = place.files()
    ended = call("eval", "model", *arguments)
    assert (ended.status, ended.out) == (2, ""), ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert place.files() == before
    return ended.err


def test_a_named_protocol_is_printed_with_the_figure(call, place) -> None:
    ended = call("eval", "model", "--eval_text", "test.txt", "--protocol", "llm-pruner", "--eval_windows", "3")
    assert ended.status == 0, ended.err
    shown = " ".join(ended.out.split())
    assert "3 windows of 128 tokens" in shown and "the tokenizer's special tokens" in shown
    assert "protocol llm-pruner" in shown.replace("│ │ │ ", "")


def test_the_protocol_reads_the_text_with_the_tokenizers_special_tokens(call, place) -> None:
    pyprune.save(tiny_llama(vocab_size=400), trained_tokenizer(bos=True), place / "bos")
    options = ("--eval_text", "test.txt", "--eval_windows", "2", "--json")
    found = [
        json.loads(call("eval", "bos", *options, *more).out)["perplexity"]
        for more in (("--protocol", "llm-pruner"), ("--eval_length", "128"))
    ]
    assert [f["length"] for f in found] == [128, 128]
    assert [f["special_tokens"] for f in found] == [True, False]
    assert found[0]["nll"] != found[1]["nll"]  # the windows are one token further


def test_windows_begin_with_a_bos_token_where_that_is_asked(call, place) -> None:
    tokenizer = trained_tokenizer(bos=True)
    pyprune.save(tiny_llama(vocab_size=400), tokenizer, place / "bos")
    found = json.loads(
        call("eval", "bos", "--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "2", "--eval_bos",
             "--json").out
    )["perplexity"]  # fmt: skip
    text = tokenizer((place / "test.txt").read_text(), add_special_tokens=False)["input_ids"]
    want = perplexity(
        pyprune.load(place / "bos"), torch.tensor(text[:126]).view(2, 63), prefix=[tokenizer.bos_token_id]
    )
    assert found["nll"] == pytest.approx(want.nll, rel=1e-6) and (found["length"], found["tokens"]) == (64, 126)


def test_a_bos_token_that_cannot_be_is_refused(call, place) -> None:
    line = refused(call, place, "--eval_text", "test.txt", "--eval_length", "64", "--eval_bos")
    assert "--eval_bos True: adds nothing: the tokenizer puts no token before texts" in line
    line = refused(call, place, "--eval_text", "test.txt", "--eval_bos", "--protocol", "llm-pruner")
    assert "--eval_bos True: contradicts protocol llm-pruner" in line


def test_a_protocol_and_another_length_are_refused(call, place) -> None:
    line = refused(call, place, "--eval_text", "test.txt", "--protocol", "2048", "--eval_length", "64")
    assert "--eval_length 64: contradicts protocol 2048, which has windows of 2048 tokens" in line
    line = refused(call, place, "--eval_text", "test.txt", "--protocol", "128")
    assert "--protocol '128': is not known" in line and "llm-pruner" in line


def test_a_protocol_on_the_command_line_replaces_the_length_of_a_recipe(call, place) -> None:
    (place / "r.yaml").write_text("eval_text: test.txt\neval_length: 64\neval_windows: 2\n")
    assert json.loads(call("eval", "model", "--config", "r.yaml", "--json").out)["perplexity"]["length"] == 64
    ended = call("eval", "model", "--config", "r.yaml", "--protocol", "llm-pruner", "--json")
    found = json.loads(ended.out)
    assert found["perplexity"]["length"] == found["recipe"]["eval_length"] == 128


def test_prune_takes_the_protocol_too(call, place) -> None:
    ended = call(
        "prune", "model", "--criterion", "l2", "--ratio", "0.2", "--eval_text", "test.txt", "--eval_windows", "2",
        "--protocol", "llm-pruner", "--json",
    )  # fmt: skip
    found = json.loads(ended.out)["perplexity"]
    assert [(f["length"], f["name"]) for f in found.values()] == [(128, "llm-pruner")] * 2


def test_accuracy_is_that_of_the_files_questions(call, place, task) -> None:
    ended = call("eval", "model", "--tasks", str(task), "--json")
    assert (ended.status, ended.err) == (0, "")
    (found,) = json.loads(ended.out)["tasks"]
    model, tokenizer = pyprune.load(place / "model"), _tokenizer(place / "model")
    read = read_task(str(task))
    wanted = accuracy(read, [v.total for v in loglikelihoods(model, tokenizer, requests_of(read))], "file")
    assert found == wanted.to_dict()
    shown = call("eval", "model", "--tasks", str(task)).out
    assert "quiz acc (16)" in shown and f"{wanted.acc_norm:.4f}" in shown


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_limit_and_resume_file(call, place, task) -> None:
    options = ("eval", "model", "--tasks", str(task), "--resume_file", "r.jsonl", "--json")
    first = json.loads(call(*options, "--limit", "5").out)["tasks"][0]
    assert first["questions"] == 5
    lines = (place / "r.jsonl").read_text().splitlines()
    again = json.loads(call(*options, "--limit", "5").out)["tasks"][0]
    assert again == first
    assert (place / "r.jsonl").read_text().splitlines() == lines
    whole = json.loads(call(*options).out)["tasks"][0]
    assert whole["questions"] == 16
    assert (place / "r.jsonl").read_text().splitlines()[: len(lines)] == lines


def test_bad_tasks_are_refused_before_the_model_is_opened(call, place, task, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.assess.open_or_take", lambda *a: pytest.fail("the model was opened"))
    bad = records()[:3]
    bad[2]["label"] = 9
    write_task(place / "bad.jsonl", bad)
    (place / "empty.jsonl").write_text("")
    line = refused(call, place, "--tasks", f"{task},bad.jsonl")
    assert "--tasks 'bad.jsonl (line 3)': field 'label' is 9" in line
    assert "--tasks 'empty.jsonl': holds no questions" in refused(call, place, "--tasks", "empty.jsonl")
    assert "--tasks 'absent.jsonl': does not exist" in refused(call, place, "--tasks", "absent.jsonl")
    line = refused(call, place, "--tasks", "hellaswg")
    assert "--tasks 'hellaswg': is not known. Did you mean 'hellaswag'?" in line
    assert "--tasks 'test.txt': is not a task file" in refused(call, place, "--tasks", "test.txt")
    assert "is given twice" in refused(call, place, "--tasks", f"{task},{task}")
    line = refused(call, place, "--prompt", "if", "--resume_file", "r.jsonl")
    assert "--resume_file 'r.jsonl': is for option tasks, which is not given" in line


@pytest.mark.parametrize(
    ("option", "switch"), [("limit", "tasks"), ("task_batch_size", "tasks"), ("speed_rounds", "speed")]
)
def test_what_is_for_something_that_is_not_measured_is_refused(call, place, option: str, switch: str) -> None:
    line = refused(call, place, "--prompt", "if", f"--{option}", "3")
    assert f"--{option} 3: is for option {switch}, which is not given. Give {switch} too, or leave it out." in line


def test_two_files_of_one_name_are_told_apart(call, place, task) -> None:
    (place / "more").mkdir()
    write_task(place / "more" / "quiz.jsonl", records()[:4])
    found = json.loads(call("eval", "model", "--tasks", f"{task},more/quiz.jsonl", "--json").out)["tasks"]
    assert [f["task"] for f in found] == ["quiz", "more/quiz.jsonl"]
    assert [f["questions"] for f in found] == [16, 4]


def test_a_task_of_lm_eval_without_lm_eval_names_the_way_out(call, place, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    line = refused(call, place, "--tasks", "piqa")
    assert "--tasks 'piqa': needs the package lm-eval" in line and "pip install 'pyprune[tasks]'" in line


def test_a_model_without_a_tokenizer_cannot_read_tasks(call, place, task) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "model" / name).unlink()
    assert "model has no tokenizer to read them with" in refused(call, place, "--tasks", str(task))


def test_speed_shows_rates_memory_and_arithmetic(call, place) -> None:
    ended = call("eval", "model", *SPEED)
    assert ended.status == 0, ended.err
    for part in (
        "prefill, tokens/s", "decode, tokens/s", "first token, ms", "KV cache a token", "1.0 KiB",
        "peak memory of the process", "MACs a token", "319.7 k", "prompt 16 tokens", "median of 2 rounds", "threads",
    ):  # fmt: skip
        assert part in ended.out, part


def test_a_prompt_longer_than_the_models_positions_is_refused(call, place) -> None:
    line = refused(call, place, "--speed", "--speed_prompt", "250")
    assert "--speed_prompt 250: with speed_tokens 32 is more than the 256 positions that the model knows" in line


def test_a_pruned_model_beside_the_dense_one(call, place, task) -> None:
    made = call("prune", "model", "--criterion", "l2", "--ratio", "0.3", "--layers", "1-2", "--output_dir", "out")
    assert made.status == 0, made.err  # widths differ from layer to layer
    options = ("--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "2", "--tasks", str(task))
    ended = call(
        "eval", "out", "--compare", "model", *options, *SPEED, "--prompt", "if", "--output", "o.json", "--json"
    )
    assert (ended.status, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert json.loads((place / "o.json").read_text()) == found
    dense, ratios = found["compare"], found["ratios"]
    assert (found["model"], dense["model"]) == ("out", "model")
    for one, folder in ((found, "out"), (dense, "model")):
        alone = json.loads(call("eval", folder, *options, "--json").out)
        assert (one["perplexity"], one["tasks"]) == (alone["perplexity"], alone["tasks"])
    assert found["footprint"]["cache_bytes_per_token"] < dense["footprint"]["cache_bytes_per_token"] == 1024
    assert ratios["parameters"] == found["parameters"] / dense["parameters"]
    assert ratios["macs_per_token"] == found["footprint"]["macs_per_token"] / 319_680
    assert ratios["decode"] == found["speed"]["decode"] / dense["speed"]["decode"]
    assert ratios["perplexity"] == found["perplexity"]["perplexity"] / dense["perplexity"]["perplexity"]
    shown = call("eval", "out", "--compare", "model", *options, "--prompt", "if").out
    assert "Side by side" in shown and "ratio" in shown and "quiz acc_norm (16)" in shown and "after 'if'" in shown


def test_a_second_model_that_is_not_there_is_told_before_the_first_is_opened(call, place, monkeypatch) -> None:
    monkeypatch.setattr("pyprune.assess.open_or_take", lambda *a: pytest.fail("a model was opened"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(call, place, "--prompt", "if", "--compare", "nowhere/at/all")
    assert "--compare 'nowhere/at/all': does not exist" in line
    line = refused(call, place, "--prompt", "if", "--compare", "nowhere")
    assert re.search("--compare 'nowhere': (is neither a|is no) local folder", line)  # by HF_HUB_OFFLINE
    (place / "model/model.safetensors").rename(place / "away.safetensors")
    assert "--compare 'model': has no weights" in refused(call, place, "--prompt", "if", "--compare", "model")


def test_windows_longer_than_the_second_models_positions_are_told_before_the_first_is_opened(
    call, place, monkeypatch
) -> None:
    monkeypatch.setattr("pyprune.assess.open_or_take", lambda *a: pytest.fail("a model was opened"))
    tiny_llama(max_position_embeddings=32).save_pretrained(place / "short")
    line = refused(call, place, "--eval_text", "test.txt", "--eval_length", "64", "--compare", "short")
    assert "--eval_length 64: is more than the 32 positions that the model knows" in line


def test_a_second_model_that_cannot_be_opened_is_called_by_its_option(call, place) -> None:
    tiny_llama().save_pretrained(place / "nan")
    weights = load_file(place / "nan/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, place / "nan/model.safetensors", metadata={"format": "pt"})
    line = refused(call, place, "--prompt", "if", "--max_new_tokens", "2", "--compare", "nan")
    assert "--compare 'nan'" in line and "not finite" in line


def test_the_result_file_is_not_replaced_unless_told(call, place) -> None:
    (place / "o.json").write_text("mine")
    ask = ("--prompt", "if", "--max_new_tokens", "2", "--output", "o.json")
    assert "--output 'o.json': exists already" in refused(call, place, *ask)
    assert "--output" in refused(call, place, "--prompt", "if", "--output", "absent/o.json")
    assert "is a folder" in refused(call, place, "--prompt", "if", "--output", "model")
    assert call("eval", "model", *ask, "--overwrite").status == 0
    assert json.loads((place / "o.json").read_text())["continuation"]["prompt"] == "if"
    assert [p.name for p in place.root.iterdir() if p.name.startswith(".")] == []


def test_python_takes_objects_and_names_on_either_side(place, task) -> None:
    options = {"tokenizer": _tokenizer(place / "model"), "tasks": [task], "limit": 4, "prompt": "if"}
    one = pyprune.evaluate(tiny_llama(), compare=str(place / "model"), **options)
    other = pyprune.evaluate(str(place / "model"), compare=tiny_llama(), **options)
    assert one["tasks"] == one["compare"]["tasks"] == other["tasks"] == other["compare"]["tasks"]
    assert one["ratios"]["parameters"] == 1.0
    assert one["continuation"] == one["compare"]["continuation"]
    with pytest.raises(pyprune.PyPruneError, match=r"task: is not an option. Did you mean 'tasks'"):
        pyprune.evaluate(tiny_llama(), task="piqa")

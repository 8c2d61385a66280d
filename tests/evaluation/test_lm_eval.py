"""Accuracy on the same questions by lm-evaluation-harness's own Hugging Face model: equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_run import tiny_llama
from helpers_tasks import records, trained_tokenizer, write_task

import pyprune
from pyprune.errors import PyPruneError
from pyprune.evaluation.loglikelihood import loglikelihoods
from pyprune.evaluation.stock import stock_accuracies
from pyprune.evaluation.tasks import accuracy, read_task, requests_of

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def harness_task(questions: list[dict[str, Any]]) -> dict[str, Any]:
    """The questions as a task configuration of lm-eval."""
    from datasets import Dataset

    return {
        "task": "local", "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
        "doc_to_target": "label", "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip


def by_harness(model: Any, tokenizer: Any, questions: list[dict[str, Any]], batch: int = 4) -> tuple[dict, list]:
    """(its results, its log-likelihoods question by question) with its own model class."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), tasks=[harness_task(questions)],
        num_fewshot=0, bootstrap_iters=1, log_samples=True, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    samples = sorted(out["samples"]["local"], key=lambda s: s["doc_id"])
    return out["results"]["local"], [[float(r[0]) for r in s["filtered_resps"]] for s in samples]


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_acc_and_acc_norm_are_those_of_the_harness(tmp_path: Path, bos: bool) -> None:
    model, tokenizer = tiny_llama(int(bos), vocab_size=400, bos_token_id=0, eos_token_id=1), trained_tokenizer(bos)
    task = read_task(str(write_task(tmp_path / "local.jsonl", records())))
    theirs, their_values = by_harness(model, tokenizer, records())
    found = loglikelihoods(model, tokenizer, requests_of(task), batch_size=5)
    ours = accuracy(task, [f.total for f in found], "file")
    assert (ours.acc, ours.acc_norm) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert ours.acc_stderr == pytest.approx(theirs["acc_stderr,none"])
    assert ours.acc_norm_stderr == pytest.approx(theirs["acc_norm_stderr,none"])
    assert [f.total for f in found] == pytest.approx([v for q in their_values for v in q], rel=1e-5)


def test_a_task_of_the_harness_is_scored_as_the_harness_scores_it() -> None:
    model, tokenizer = tiny_llama(2, vocab_size=400, bos_token_id=0, eos_token_id=1), trained_tokenizer()
    theirs, _ = by_harness(model, tokenizer, records())
    (ours,) = stock_accuracies(lambda pairs, _: loglikelihoods(model, tokenizer, pairs), [harness_task(records())])
    assert (ours.acc, ours.acc_norm) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert (ours.acc_stderr, ours.questions, ours.source) == (theirs["acc_stderr,none"], 40, "lm-eval")


def test_a_stock_name_is_scored_as_the_harness_scores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_llama(3, vocab_size=400, bos_token_id=0, eos_token_id=1), trained_tokenizer()
    rows = [{"goal": r["context"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": i % 2}
            for i, r in enumerate(records())]  # fmt: skip
    held = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "validation")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: held)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=["piqa"], num_fewshot=0, limit=30,
        bootstrap_iters=1, log_samples=False,
    )["results"]["piqa"]  # fmt: skip
    file = write_task(tmp_path / "quiz.jsonl", records()[:9])
    found = pyprune.evaluate(
        model, tokenizer=tokenizer, tasks=["piqa", file], limit=30, resume_file=tmp_path / "seen.jsonl"
    )
    ours, other = found["tasks"]
    assert (ours["task"], ours["questions"], ours["source"]) == ("piqa", 30, "lm-eval")
    assert (ours["acc"], ours["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert (other["task"], other["questions"], other["source"]) == ("quiz", 9, "file")
    assert len((tmp_path / "seen.jsonl").read_text().splitlines()) > 60


def test_the_limit_is_passed_on() -> None:
    model, tokenizer = tiny_llama(2, vocab_size=400, bos_token_id=0, eos_token_id=1), trained_tokenizer()
    asked: list[int] = []

    def score(pairs: Any, label: str) -> Any:
        asked.append(len(pairs))
        return loglikelihoods(model, tokenizer, pairs)

    questions = records()
    (ours,) = stock_accuracies(score, [harness_task(questions)], limit=3)
    assert ours.questions == 3
    assert asked == [sum(len(q["choices"]) for q in questions[:3])]


def test_data_that_cannot_be_had_is_one_clear_error() -> None:
    # The suite runs with the hub switched off.
    with pytest.raises(PyPruneError, match=r"tasks 'piqa': cannot be run by lm-eval: .*task file"):
        stock_accuracies(lambda pairs, _: [], ["piqa"])


def test_a_task_that_generates_text_is_refused() -> None:
    task = {**harness_task(records()), "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    del task["doc_to_choice"]
    with pytest.raises(PyPruneError, match="not multiple choice"):
        stock_accuracies(lambda pairs, _: [], [task])

"""A file of log-likelihoods: what is in it is not computed again, and nothing wrong is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_run import tiny_llama
from helpers_tasks import records, trained_tokenizer

from pyprune.errors import PyPruneError
from pyprune.evaluation.loglikelihood import loglikelihoods
from pyprune.evaluation.resume import Store
from pyprune.importance.fingerprint import fingerprint_of_weights

PAIRS = [(r["context"], " " + c) for r in records(12) for c in r["choices"]]


def model(seed: int = 0, **changes):
    return tiny_llama(seed, vocab_size=400, num_hidden_layers=2, **changes)


def score(file: Path, one, pairs=PAIRS, **options):
    with Store(file, one) as store:
        found = loglikelihoods(one, trained_tokenizer(), pairs, store=store, **options)
    return found, store.reused


def test_what_is_in_the_file_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, reused = score(tmp_path / "r.jsonl", model())
    assert reused == 0
    monkeypatch.setattr("pyprune.evaluation.loglikelihood._score", lambda *a: pytest.fail("computed again"))
    again, reused = score(tmp_path / "r.jsonl", model())
    assert again == first
    assert reused == len((tmp_path / "r.jsonl").read_text().splitlines()) - 1


@pytest.mark.parametrize("cut", ["between lines", "inside a line"])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch, cut: str) -> None:
    from pyprune.evaluation import loglikelihood

    whole = loglikelihoods(model(), trained_tokenizer(), PAIRS)
    original, calls = loglikelihood._score, []

    def breaks(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loglikelihood, "_score", breaks)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "r.jsonl", model(), batch_size=4)
    monkeypatch.setattr(loglikelihood, "_score", original)
    file = tmp_path / "r.jsonl"
    if cut == "inside a line":
        file.write_bytes(file.read_bytes()[:-9])
    kept = len([line for line in file.read_text().split("\n")[:-1]]) - 1
    again, reused = score(file, model(), batch_size=4)
    assert reused == kept > 0
    assert [a.total for a in again] == pytest.approx([w.total for w in whole], rel=1e-5)
    assert score(file, model())[1] > reused  # and the file is whole again


def test_one_file_serves_several_models_and_another_model_uses_nothing_of_the_first(tmp_path: Path) -> None:
    first, _ = score(tmp_path / "r.jsonl", model(0))
    other, reused = score(tmp_path / "r.jsonl", model(1))
    assert reused == 0 and other != first
    assert score(tmp_path / "r.jsonl", model(0))[0] == first


def test_the_fingerprint_changes_with_a_weight_a_buffer_a_type_and_the_configuration_and_not_with_the_place() -> None:
    marks = [fingerprint_of_weights(model())]
    one = model()
    one.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    marks.append(fingerprint_of_weights(one))
    marks.append(fingerprint_of_weights(model().to(torch.bfloat16)))
    buffered = model()
    buffered.register_buffer("correction", torch.ones(3))
    marks.append(fingerprint_of_weights(buffered))
    one = model()
    one.config.rms_norm_eps = 1e-3
    marks.append(fingerprint_of_weights(one))
    assert len(set(marks)) == 5
    one = model()
    one.config._name_or_path = "elsewhere"
    assert fingerprint_of_weights(one) == marks[0]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    for text in ('{"text": "mine"}\n', "notes\n"):
        file.write_text(text)
        with pytest.raises(PyPruneError, match="is no file of log-likelihoods"):
            Store(file, model())
        assert file.read_text() == text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    score(file, model(), PAIRS[:6])
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:20]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(PyPruneError, match="line 3 is damaged"), Store(file, model()):
        pass


def test_a_file_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    file, one = tmp_path / "r.jsonl", model()
    with Store(file, one):
        with open(file, "a") as other:
            other.write('{"key": "unfin')
        with pytest.raises(PyPruneError, match="is being written by another process"), Store(file, one):
            pass
        assert file.read_text().endswith("unfin")
    with Store(file, one):
        assert file.read_text().endswith("}\n")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent" / "r.jsonl"):
        with pytest.raises(PyPruneError, match="resume_file"):
            Store(place, model())

"""Scores kept on the disk: no forward pass for what was scored before, and never a stale or damaged figure."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from helpers_run import tiny_llama

import pyprune
from pyprune.errors import PyPruneError
from pyprune.importance import cache
from pyprune.importance.fingerprint import fingerprint
from pyprune.importance.scores import Scores
from pyprune.importance.steps import Forward


def tokens(seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for every forward pass that scoring makes."""
    seen: list[int] = []
    real = Forward.__call__

    def counted(self, step):
        seen.append(step.rows)
        return real(self, step)

    monkeypatch.setattr(Forward, "__call__", counted)
    return seen


def prune(folder, model=None, **options):
    """By scores alone, whose cache this is about."""
    folder = None if folder is None else str(folder)
    options = {"ratio": 0.2, "method": "plain", "calibration": tokens(), "cache": folder, **options}
    return pyprune.prune(tiny_llama() if model is None else model, **options)


@pytest.mark.parametrize("criterion", ["param_first", "wanda"])
def test_another_ratio_reads_the_scores_and_makes_the_uncached_plan(criterion: str, tmp_path, passes) -> None:
    prune(tmp_path / "c", ratio=0.2, criterion=criterion)
    assert passes
    passes.clear()
    second = prune(tmp_path / "c", ratio=0.3, criterion=criterion)
    assert passes == []
    assert second.scores.details["cached"].startswith(str(tmp_path / "c"))
    plain = prune(None, ratio=0.3, criterion=criterion)
    assert passes and "cached" not in plain.scores.details
    assert second.plan.cuts == plain.plan.cuts
    assert all(torch.equal(second.scores[name], values) for name, values in plain.scores.items())
    state = plain.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in second.model.state_dict().items())


def test_layer_scores_and_those_of_an_allocation_and_of_each_step_are_kept_too(tmp_path, passes) -> None:
    options = {
        "remove_layers": 1, "layer_criterion": "perplexity", "criterion": "wanda", "allocation": "knapsack",
        "allocation_criterion": "group_fisher", "iterative_steps": 2, "ratio": 0.35,
    }  # fmt: skip
    first = prune(tmp_path, **options)
    assert passes and len(list(tmp_path.glob("scores-*.safetensors"))) == 5
    passes.clear()
    assert prune(tmp_path, **options).plan.cuts == first.plan.cuts
    assert passes == []


CHANGES = {
    "another criterion": {"criterion": "param_second"},
    "another aggregation": {"aggregation": "max"},
    "another route": {"route": "gradients"},
    "other text": {"calibration": tokens(4)},
    "fewer samples": {"samples": 3},
    "other roles": {"roles": "ffn"},
    "other layers": {"layers": "1-2"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_scores_depend_on_is_scored_again(change, tmp_path, passes) -> None:
    prune(tmp_path)
    passes.clear()
    assert "cached" not in prune(tmp_path, **change).scores.details
    assert passes


def test_one_changed_weight_is_scored_again(tmp_path, passes) -> None:
    prune(tmp_path)
    passes.clear()
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 7] += 1e-6
    prune(tmp_path, model)
    assert passes


def test_what_scores_do_not_depend_on_is_read(tmp_path, passes) -> None:
    prune(tmp_path)
    passes.clear()
    prune(tmp_path, ratio=None, widths={"ffn": 0.5, "kv_heads": 2}, allocation="uniform", round_to=8)
    prune(tmp_path, allocation="global", count_embeddings=False)
    assert passes == []


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "other bytes": lambda data: data[:-3] + bytes(3 * [data[-1] ^ 0x55]),
    "no safetensors": lambda data: b"something else altogether",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_made_anew(damage, tmp_path, passes) -> None:
    expected = prune(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    passes.clear()
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged; the scores are computed again"):
        again = prune(tmp_path)
    assert passes and again.plan.cuts == expected.plan.cuts
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(tmp_path)
    assert passes == []


def test_writers_of_one_file_never_leave_half_of_it(tmp_path) -> None:
    model = tiny_llama()
    values = Scores({"g": torch.arange(50_000).float()[None]}, "x")
    wrong: list[str] = []

    def work() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(5):
                got = cache.cached(str(tmp_path), model, None, {}, lambda: values)
                if not torch.equal(got["g"], values["g"]):
                    wrong.append("other scores")
                for file in tmp_path.glob("scores-*"):
                    if Scores.load(file)["g"].shape != (1, 50_000):
                        wrong.append("half a file")
        wrong.extend(str(w.message) for w in told)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written .*No space left"):
        out = prune(tmp_path)
    assert out.model is not None and not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PyPruneError, match="cannot be a folder"):
            prune(folder)


def test_scores_that_other_code_made_are_made_again(tmp_path, passes, monkeypatch) -> None:
    prune(tmp_path)
    passes.clear()
    monkeypatch.setattr(cache, "own_code", lambda: "mended")
    prune(tmp_path)
    assert passes


@pytest.mark.parametrize(
    ("one", "other"),
    [([1, 23], [12, 3]), ({"a": {}, "b": 1}, {"a": {"b": 1}}), (["ab"], ["a", "b"]), ([[1], 2], [[1, 2]]), (1, "1")],
)
def test_no_two_values_have_one_fingerprint(one, other) -> None:
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)

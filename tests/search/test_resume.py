"""A killed search goes on from its state, to what it would have found; a file with something else is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_search import ids, make

from pyprune.errors import PyPruneError
from pyprune.search import evolution, state
from pyprune.search.fitness import Fitness
from pyprune.search.state import State, fingerprint_of_search


def kept(plan) -> list:
    return [(c.group.name, c.kept) for c in plan.cuts]


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize(("compensation", "after"), [("none", 2), ("none", 33), ("least-squares", 16)])
def test_a_killed_search_finds_what_an_uninterrupted_one_finds(
    case, tmp_path: Path, monkeypatch, compensation: str, after: int
) -> None:
    """Killed while a start is tried, while starts are confirmed, and in several generations."""
    monkeypatch.setattr(evolution, "VERIFIED", 3)
    file, options = tmp_path / "state.json", {"compensation": compensation, "steps": 5}
    whole = case.search(**options)
    real, calls = Fitness.total, []

    def killed(self, *args):
        calls.append(args)
        if len(calls) == after:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Fitness, "total", killed)
        with pytest.raises(Killed):
            case.search(**options, file=file)
    before = json.loads(file.read_text())
    assert len(before["points"]) <= after
    resumed = case.search(**options, file=file)
    assert kept(resumed) == kept(whole)
    for name in ("divergence", "generations", "starts"):
        assert resumed.details["search"][name] == whole.details["search"][name]
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_finished_search_is_read_back_without_new_candidates(case, tmp_path: Path, monkeypatch) -> None:
    first = case.search(steps=3, file=tmp_path / "s.json")
    monkeypatch.setattr(Fitness, "total", lambda *a: pytest.fail("a candidate was measured"))
    again = case.search(steps=3, file=tmp_path / "s.json")
    assert kept(again) == kept(first)


def test_more_steps_go_on_from_a_finished_search(case, tmp_path: Path) -> None:
    first = case.search(steps=2, file=tmp_path / "s.json").details["search"]
    more = case.search(steps=6, file=tmp_path / "s.json").details["search"]
    assert more["generations"] == 6 and more["evaluations"] > first["evaluations"]
    assert more["divergence"] <= first["divergence"]
    assert more["seconds"] > first["seconds"]


@pytest.mark.parametrize(
    "what",
    ["model", "configuration", "buffer", "version", "calibration", "ratio", "scores", "seed", "compensation"],
)
def test_the_state_of_another_search_is_refused_and_kept(case, tmp_path: Path, monkeypatch, what: str) -> None:
    file = tmp_path / "s.json"
    case.search(steps=1, file=file)
    before = file.read_bytes()
    options = {"steps": 1, "file": file}
    if what == "model":
        with torch.no_grad():
            case.model.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    elif what == "configuration":
        case.model.config.hidden_act = "relu"
    elif what == "buffer":
        case.model.model.rotary_emb.inv_freq.mul_(2)  # is in no state dict
    elif what == "version":
        monkeypatch.setattr(state, "running_versions", lambda: {"torch": "another"})
    elif what == "scores":
        case.scores = {k: -v for k, v in case.scores.items()}
    else:
        options |= {"calibration": {"batches": ids(seed=4)}, "ratio": {"ratio": 0.25}, "seed": {"seed": 9},
                    "compensation": {"compensation": "none"}}[what]  # fmt: skip
    with pytest.raises(PyPruneError, match=r"search_file .*holds a search of another model, calibration or request"):
        case.search(**options)
    assert file.read_bytes() == before
    case.search(**options, overwrite=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "pyprune-search", "version": 1, "odd": 3}', "\x00"])
def test_a_file_that_holds_no_state_is_refused_and_kept(case, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(PyPruneError, match=r"search_file .*does not hold the state of a search"):
        case.search(file=file)
    assert file.read_text() == text


def test_a_state_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match=r"search_file .*cannot be written"):
        State("x").save(tmp_path / "nowhere" / "s.json")


def test_a_model_that_is_the_same_made_anew_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    make().search(steps=2, file=file)
    assert make().search(steps=2, file=file).details["search"]["generations"] == 2


def test_a_model_that_differs_in_one_weight_is_another() -> None:
    model = make().model
    before = fingerprint_of_search(model, [])
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[weight.shape[0] // 2 + 1, 3] += 1e-6
    assert fingerprint_of_search(model, []) != before

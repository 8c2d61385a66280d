"""``pyprune prune --allocation search``: from the command line to the folder, and what it refuses beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_run import refused, tiny_llama, write_model, write_text

import pyprune
from pyprune.config import PruneConfig
from pyprune.errors import PyPruneError
from pyprune.schedule import forget_search
from pyprune.search.fitness import Fitness

SEARCH = ("prune", "model", "--calibration", "train.txt", "--samples", "8", "--length", "32", "--ratio", "0.2",
          "--allocation", "search", "--criterion", "wanda")  # fmt: skip


def test_the_command_line_searches_saves_and_cleans_up(call, place) -> None:
    ended = call(*SEARCH, "--search_steps", "2", "--compensation", "least-squares", "--output_dir", "out", "--json")
    assert ended.status == 0, ended.err
    shown = json.loads(ended.out)
    assert shown["plan"]["allocation"] == "search" and shown["plan"]["search"]["generations"] == 2
    assert shown["recipe"]["search_steps"] == 2
    assert len(set(json.loads((place / "out" / "config.json").read_text()))) > 1
    assert pyprune.load(place / "out").num_parameters() == shown["parameters"]["with_embeddings"]["after"]
    assert not [name for name in place.files() if "search" in name]


def test_a_killed_run_leaves_its_state_beside_the_output_and_goes_on(place, monkeypatch) -> None:
    options = {"calibration": "train.txt", "samples": 8, "length": 32, "ratio": 0.2, "allocation": "search",
               "criterion": "wanda", "search_steps": 4}  # fmt: skip
    whole = pyprune.prune("model", **options)
    real, calls = Fitness.total, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Fitness, "total", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pyprune.prune("model", output_dir="out", **options)
    assert Path(".out.search.json").is_file() and not Path("out").exists()
    resumed = pyprune.prune("model", output_dir="out", **options)
    assert [c.kept for c in resumed.plan.cuts] == [c.kept for c in whole.plan.cuts]
    assert Path("out").is_dir() and not Path(".out.search.json").exists()


def test_a_state_file_that_was_named_stays(place) -> None:
    pyprune.prune("model", calibration="train.txt", samples=8, length=32, ratio=0.2, allocation="search",
                  search_steps=1, search_file="mine.json", output_dir="out")  # fmt: skip
    assert json.loads(Path("mine.json").read_text())["generation"] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--stream", "--output_dir", "out"), "--allocation 'search': runs the whole model many times, and stream"),
        (("--iterative_steps", "2"), "--iterative_steps 2: does not go with allocation search"),
        (("--search_minutes", "0"), "--search_minutes '0': must be a number above 0"),
        (("--search_minutes", "-3"), "--search_minutes '-3': must be a number above 0"),
        (("--search_steps", "0"), "--search_steps '0': must be a whole number, at least 1"),
        (("--samples", "3"), "--samples 3: are too few for an allocation that measures"),
        (("--roles", "hidden", "--criterion", "l2"), "--roles 'hidden': cannot be searched over"),
        (("--profile", "uniform", "--output_dir", "out"), "--allocation 'search': gives layers different widths"),
        (("--search_file", "model"), "--search_file 'model': cannot be written"),
    ],
    ids=lambda v: v[0].strip("-") if isinstance(v, tuple) else "",
)
def test_what_does_not_go_is_refused_before_scoring(call, place, monkeypatch, more, words: str) -> None:
    monkeypatch.setattr("pyprune.cutting.score", lambda *a, **k: pytest.fail("scoring has begun"))
    assert words in refused(call, place, *SEARCH, *more)


@pytest.mark.parametrize("option", ["search_steps", "search_minutes", "search_file"])
def test_options_of_the_search_want_the_search(option: str) -> None:
    for how in ({"criterion": "l2"}, {}):  # of a ratio alone, a method settles the allocation
        with pytest.raises(PyPruneError, match=rf"{option} .*is for allocation search, which is not asked for\. Give"):
            pyprune.prune(tiny_llama(), ratio=0.2, **how, **{option: "3"})


def test_the_state_beside_an_output_is_found_by_its_name_and_no_pattern(tmp_path: Path) -> None:
    mine, other = tmp_path / ".run[1].search.json", tmp_path / ".run1.search.json"
    mine.touch(), other.touch()
    forget_search(PruneConfig.build({"ratio": 0.2, "allocation": "search", "output_dir": str(tmp_path / "run[1]")}))
    assert other.exists() and not mine.exists()


def test_calibration_is_wanted_even_where_the_criterion_needs_none() -> None:
    with pytest.raises(PyPruneError, match="calibration: is missing, and allocation search measures on text"):
        pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", allocation="search")


def test_scores_by_weights_are_searched_with_too(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "train.txt")
    out = pyprune.prune(tmp_path / "model", ratio=0.2, criterion="l2", allocation="search", samples=6, length=32,
                        calibration=tmp_path / "train.txt", search_steps=1, profile="hetero-hf")  # fmt: skip
    assert out.report.to_dict()["plan"]["search"]["compensation"] == "none"

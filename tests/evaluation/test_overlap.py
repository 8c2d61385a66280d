"""Measuring on the text that a model was pruned with is told."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers_run import tiny_llama, write_model, write_text

import pyprune
from pyprune.evaluation.overlap import overlap_notes, same_source, shared_shingles


def stream(seed: int, count: int = 4096) -> torch.Tensor:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed))


def test_the_share_is_counted_in_passages_of_16_tokens() -> None:
    text = stream(0)
    other = stream(1).reshape(8, 512)
    assert shared_shingles([text.reshape(8, 512)], other) == 0
    assert shared_shingles([text.reshape(8, 512)], text.reshape(8, 512)) == 1
    mixed = other.clone()
    mixed[0] = text[100:612]  # 497 of 8 * 497 passages, at another offset than the rows of the first text
    expected = len({tuple(text[i : i + 16].tolist()) for i in range(100, 597) if i % 512 <= 496}) / (8 * 497)
    assert shared_shingles([text.reshape(8, 512)], mixed) == pytest.approx(expected)


def test_few_samples_of_a_long_evaluation_text_are_found_in_it() -> None:
    text = stream(0)
    assert shared_shingles([text[None, 700:764], text[None, 2100:2164]], text.reshape(8, 512)) == 1


def test_padding_and_short_rows_are_no_passages() -> None:
    blank = torch.zeros(2, 64, dtype=torch.int64)
    assert shared_shingles([blank], blank) == 0
    assert shared_shingles([stream(0)[None, :10]], stream(0)[None, :10]) == 0


def test_one_file_under_two_names_and_one_dataset_are_the_same_source(tmp_path) -> None:
    text = write_text(tmp_path / "a.txt")
    shutil.copy(text, tmp_path / "b.txt")
    other = write_text(tmp_path / "c.txt", skip=40_000)
    assert same_source(str(text), tmp_path / "." / "a.txt") == "the same file"
    assert same_source(str(text), str(tmp_path / "b.txt")) == "files of the same content"
    assert same_source(str(text), str(other)) is None
    assert same_source("owner/name:raw:test", "owner/name:raw:test") == "the same dataset and split"
    assert same_source("owner/name:raw:train", "owner/name:raw:test") is None
    ids = stream(0)
    assert same_source(ids, ids) == "the same object" and same_source(ids, ids.clone()) is None


def test_prune_notes_one_corpus_and_stays_silent_on_two() -> None:
    text = stream(5, 2048).reshape(16, 128)
    options = {"ratio": 0.2, "criterion": "param_first", "eval_length": 128}
    said = pyprune.prune(tiny_llama(), calibration=text[:8], eval_text=text.clone(), **options).report.warnings
    assert [w for w in said if "share 100% of their passages of 16 tokens" in w]
    said = pyprune.prune(tiny_llama(), calibration=text[:8], eval_text=text[8:], **options).report.warnings
    assert not [w for w in said if "flatters" in w]


def test_eval_of_a_pruned_folder_notes_its_calibration_text(tmp_path) -> None:
    folder, train = write_model(tmp_path / "m"), write_text(tmp_path / "train.txt")
    test = write_text(tmp_path / "test.txt", 4000, skip=40_000)
    out = tmp_path / "out"
    pyprune.prune(
        folder, ratio=0.2, criterion="param_first", calibration=str(train), samples=4, length=64, output_dir=out
    )
    options = {"eval_length": 64, "eval_windows": 2}
    assert any(
        "calibration text (the same file)" in w for w in pyprune.evaluate(out, eval_text=train, **options)["warnings"]
    )
    assert pyprune.evaluate(out, eval_text=test, **options)["warnings"] == []
    assert pyprune.evaluate(folder, eval_text=train, **options)["warnings"] == []


def test_without_an_evaluation_nothing_is_said() -> None:
    assert overlap_notes("a.txt", [{"input_ids": stream(0)[None]}], None, None) == []

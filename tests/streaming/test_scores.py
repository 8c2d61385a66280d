"""Scores of a model on disk are those of the same model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_run import tiny_llama

from pyprune.checkpoint import load
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import load_calibration
from pyprune.importance.scoring import score
from pyprune.streaming import scores as streamed
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.scores import score_from_disk
from pyprune.streaming.workspace import Workspace

CRITERIA = ["random", "l1", "l2", "param_first", "param_second", "param_mix", "vectorize", "group_fisher"]


def batches(**extra):
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    return load_calibration([{"input_ids": ids[i : i + 2], **extra} for i in (0, 2, 4)])


def both(folder: Path, space: Path, criterion: str, calibration=None, dtype: str = "auto", **options):
    calibration = batches() if calibration is None else calibration
    disk = DiskModel(folder, dtype)
    workspace = Workspace(space / "out", {})
    try:
        ours = score_from_disk(disk, discover(disk.model), calibration, workspace, criterion, **options)
    finally:
        workspace.remove()
    model = load(folder, dtype)
    return ours, score(model, discover(model), calibration, criterion, **options)


def check_same(ours, theirs, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        largest = float(theirs[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_gives_the_numbers_of_the_engine_in_memory(sharded, tmp_path, criterion) -> None:
    check_same(*both(sharded, tmp_path, criterion))


@pytest.mark.parametrize("roles", [["hidden"], ["layers"], ["kv_heads", "ffn"]])
def test_units_outside_the_blocks_and_whole_layers_are_scored_alike(sharded, tmp_path, roles) -> None:
    check_same(*both(sharded, tmp_path, "param_first", roles=roles))


def test_layers_below_the_scored_ones_take_no_backward_pass(sharded, tmp_path) -> None:
    ours, theirs = both(sharded, tmp_path, "param_second", roles=["ffn"], layers=[2, 3])
    check_same(ours, theirs)
    assert ours.details["recomputed_blocks"] == 2


@pytest.mark.parametrize("criterion", ["param_first", "param_second", "group_fisher"])
def test_both_routes_give_the_same_numbers(sharded, tmp_path, criterion) -> None:
    ours, theirs = both(sharded, tmp_path, criterion, route="gradients")
    check_same(ours, theirs)
    assert ours.details["route"] == "gradients"


def test_batches_of_different_lengths_with_padding_are_scored_alike(sharded, tmp_path) -> None:
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 15:] = 0
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(2))
    mixed = [{"input_ids": ids[:2], "attention_mask": mask}, {"input_ids": ids[2:3, :10]}, {"input_ids": ids[3:]}]
    check_same(*both(sharded, tmp_path, "param_first", load_calibration(mixed)))


def test_untied_heads_are_scored_alike(tmp_path) -> None:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    check_same(*both(tmp_path / "model", tmp_path, "param_first", roles=["hidden"]))


def test_float16_losses_are_scaled_like_in_memory(sharded, tmp_path) -> None:
    ours, theirs = both(sharded, tmp_path, "param_first", dtype="float16")
    assert ours.details["loss_scale"] == theirs.details["loss_scale"] > 1
    check_same(ours, theirs, 1e-2)


def test_an_overflow_of_float16_gradients_is_answered_by_a_smaller_scale(sharded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(streamed, "FLOAT16_SCALES", (2.0**60, 2.0**10))
    ours, theirs = both(sharded, tmp_path, "param_first", dtype="float16")
    assert ours.details["loss_scale"] == 2.0**10
    check_same(ours, theirs, 2e-2)


def test_the_report_s_loss_is_that_of_the_engine_in_memory(sharded, tmp_path) -> None:
    ours, theirs = both(sharded, tmp_path, "param_first")
    assert ours.details["loss"] == pytest.approx(theirs.details["loss"], rel=1e-6)
    assert ours.details["calibration"] == theirs.details["calibration"]


def test_weights_are_on_the_meta_device_before_and_after(sharded, tmp_path) -> None:
    disk = DiskModel(sharded)
    workspace = Workspace(tmp_path / "out", {})
    score_from_disk(disk, discover(disk.model), batches(), workspace, "param_first")
    workspace.remove()
    assert all(p.is_meta for p in disk.model.parameters())


def test_a_weight_that_is_not_finite_is_named(tmp_path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    disk = DiskModel(tmp_path / "model")
    workspace = Workspace(tmp_path / "out", {})
    with pytest.raises(PyPruneError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 weights that are not finite"):
        score_from_disk(disk, discover(disk.model), batches(), workspace, "param_first")
    workspace.remove()

"""Sums kept on the disk: refits without a forward pass, bit for bit those that running the model gives."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids, planned
from helpers_families import build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from torch import nn

import pyprune
from pyprune import discover, score, select
from pyprune.compensation import compensate
from pyprune.compensation import gather as gathering
from pyprune.compensation import stage as stages
from pyprune.compensation.cache import Folder, SumsCache
from pyprune.compensation.stage import Compensation
from pyprune.compensation.triangle import mirrored, upper
from pyprune.errors import PyPruneError
from pyprune.importance.steps import Forward
from pyprune.selection.plan import Plan

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward pass over calibration, trials on a few of its tokens included."""
    seen: list[int] = []
    real = Forward.__call__

    def counted(self: Forward, step: Any) -> Any:
        seen.append(step.rows)
        return real(self, step)

    monkeypatch.setattr(Forward, "__call__", counted)
    return seen


def fitted(dense: nn.Module, plan: Plan, cache: Path | None, **options: Any) -> tuple[nn.Module, Compensation]:
    model = copy.deepcopy(dense)
    return model, compensate(model, plan, options.pop("batches", ids()), cache=cache, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def widths(model: nn.Module, ffn: list[int], **others: int) -> Plan:
    """FFN widths layer by layer; other roles alike in all."""
    plans = [planned(model, ffn=n) for n in ffn]
    cuts = [p[f"model.layers.{i}.mlp:ffn"] for i, p in enumerate(plans) if ffn[i] < 24]
    if others:
        cuts += planned(model, "l2", **others).cuts
    return Plan(tuple(cuts))


@pytest.mark.parametrize(
    ("changes", "target", "mode", "kept_bytes"),
    [
        ({}, "own", "obs", stages.KEPT_BYTES),
        (BIASES, "own", "least-squares", 0),
        (BIASES, "stream", "least-squares", stages.KEPT_BYTES),
    ],
)
def test_a_second_run_makes_no_forward_pass_and_the_same_bits(
    changes: dict[str, bool], target: str, mode: str, kept_bytes: int, tmp_path: Path, passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stages, "KEPT_BYTES", kept_bytes)
    dense = tiny_llama(**changes)
    plan = planned(dense, kv_heads=1, ffn=14)
    plain, without = fitted(dense, plan, None, mode=mode, target=target)
    first, done = fitted(dense, plan, tmp_path, mode=mode, target=target)
    assert passes and done.details["sums_read"] == 0 and "sums_read" not in without.details
    passes.clear()
    embedded: list[int] = []
    model = copy.deepcopy(dense)
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1))
    again = compensate(model, plan, ids(), mode, target=target, cache=tmp_path)
    assert passes == embedded == []
    assert again.details["sums_read"] == 6
    assert same(plain, first) and same(plain, model)
    assert again.matrices == without.matrices and again.plan.cuts == without.plan.cuts


@pytest.mark.parametrize(
    ("changes", "target", "kept_bytes", "heads"),
    [
        (BIASES, "own", stages.KEPT_BYTES, {}),
        ({}, "own", 0, {"kv_heads": 1}),
        (BIASES, "stream", stages.KEPT_BYTES, {"kv_heads": 1}),
        ({}, "stream", 0, {"qk_dim": 2}),
    ],
)
def test_streams_that_are_made_up_for_late_have_the_bits_of_those_made_in_time(
    changes: dict[str, bool], target: str, kept_bytes: int, heads: dict[str, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, passes: list[int],
) -> None:  # fmt: skip
    """Two blocks from the disk, the third one, of another width, on streams that have to be run first."""
    monkeypatch.setattr(stages, "KEPT_BYTES", kept_bytes)
    dense = tiny_llama(**changes, num_hidden_layers=4)
    one, two = widths(dense, [14, 16, 12, 20], **heads), widths(dense, [14, 16, 18, 10], **heads)
    fitted(dense, one, tmp_path, target=target)
    made = len(passes)
    passes.clear()
    plain, _ = fitted(dense, two, None, target=target)
    passes.clear()
    late, done = fitted(dense, two, tmp_path, target=target)
    assert same(plain, late)
    shared = 3 + 3 * ("kv_heads" in heads)  # matrices in front of the first that differs, and that one
    assert done.details["sums_read"] == shared
    assert 0 < len(passes) < made


def test_a_block_of_which_the_first_matrix_is_read_runs_for_the_second(tmp_path: Path) -> None:
    dense = tiny_llama(**BIASES)
    one, two = (Plan((*planned(dense, kv_heads=1).cuts, *planned(dense, ffn=n).cuts)) for n in (14, 12))
    for target in ("own", "stream"):
        fitted(dense, one, tmp_path, target=target)
        plain, _ = fitted(dense, two, None, target=target)
        late, done = fitted(dense, two, tmp_path, target=target)
        assert done.details["sums_read"] == 2 and same(plain, late)


def test_other_penalties_share_what_was_summed_before_the_first_refit(tmp_path: Path) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path)
    plain, _ = fitted(dense, plan, None, penalties=(10.0,))
    late, done = fitted(dense, plan, tmp_path, penalties=(10.0,))
    assert done.details["sums_read"] == 1 and same(plain, late)


def test_experts_are_read_too(tmp_path: Path, passes: list[int]) -> None:
    dense = mixture("mixtral")
    plan = planned(dense, "l2", expert_ffn=12)
    plain, without = fitted(dense, plan, None)
    fitted(dense, plan, tmp_path)
    passes.clear()
    model, done = fitted(dense, plan, tmp_path)
    assert passes == [] and same(plain, model) and done.matrices == without.matrices


@pytest.mark.parametrize("family", ["GPT-2", "Falcon, grouped", "GPT-J"])
def test_transposed_weights_and_parallel_blocks_are_read_too(family: str, tmp_path: Path, passes: list[int]) -> None:
    dense = build(family, tmp_path / "model")
    groups = discover(dense).thaw(("kv_heads", "query_heads"))
    tokens = ids(24, vocabulary=101)
    plan = select(groups, score(dense, groups, tokens, "wanda", roles=["ffn"]), widths={"ffn": 0.67})
    plain, _ = fitted(dense, plan, None, batches=tokens)
    fitted(dense, plan, tmp_path / "cache", batches=tokens)
    passes.clear()
    model, _ = fitted(dense, plan, tmp_path / "cache", batches=tokens)
    assert passes == [] and same(plain, model)


def test_a_model_that_runs_as_a_whole_is_read_too(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyprune.importance import walk
    from pyprune.importance.blocks import NotSweepable

    def refuse(*_: Any) -> None:
        raise NotSweepable("no")

    monkeypatch.setattr(walk, "plan_sweep", refuse)
    dense = tiny_llama()
    plan = planned(dense, kv_heads=1, ffn=14)
    plain, _ = fitted(dense, plan, None)
    fitted(dense, plan, tmp_path)
    passes.clear()
    model, done = fitted(dense, plan, tmp_path)
    assert passes == [] and done.details["sums_read"] == 6 and same(plain, model)


def test_mean_biases_are_read_and_models_without_are_still_refused(tmp_path: Path, passes: list[int]) -> None:
    dense = tiny_llama(mlp_bias=True)
    plan = planned(dense, ffn=14)
    plain, _ = fitted(dense, plan, None, mode="bias")
    fitted(dense, plan, tmp_path, mode="bias")
    passes.clear()
    model, done = fitted(dense, plan, tmp_path, mode="bias")
    assert passes == [] and same(plain, model) and len(done.matrices) == 3
    bare = tiny_llama()
    for _ in range(2):
        with pytest.raises(PyPruneError, match="with a bias"):
            fitted(bare, planned(bare, ffn=14), tmp_path, mode="bias")


CHANGES = {
    "other text": {"batches": ids(seed=4)},
    "fewer samples": {"batches": ids(39)},
    "equal tokens": {"token_weights": "equal"},
    "another target": {"target": "stream"},
    "padding": {"batches": [{"input_ids": ids(), "attention_mask": (torch.arange(16) < 15).long().expand(40, 16)}]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_sums_depend_on_is_summed_again(change: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path)
    plain, _ = fitted(dense, plan, None, **change)
    model, done = fitted(dense, plan, tmp_path, **change)
    assert done.details["sums_read"] == 0 and same(plain, model)


def test_one_changed_weight_is_summed_again(tmp_path: Path) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path)
    with torch.no_grad():
        dense.model.layers[2].self_attn.q_proj.weight[0, 0] += 1e-3
    assert fitted(dense, plan, tmp_path)[1].details["sums_read"] == 0


DAMAGES = {
    "cut short": lambda data, other: data[: len(data) // 2],
    "empty": lambda data, other: b"",
    "other bytes": lambda data, other: data[:-3] + bytes(3 * [data[-1] ^ 0x55]),
    "of something else": lambda data, other: other,
    "no safetensors": lambda data, other: b"something else altogether",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["sums-*.safetensors", "walk-*.json"])
def test_a_damaged_file_is_named_and_made_anew(kind: str, damage: Any, tmp_path: Path) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path / "other", token_weights="equal")
    plain, _ = fitted(dense, plan, tmp_path / "c")
    file = sorted((tmp_path / "c").glob(kind))[0]
    file.write_bytes(damage(file.read_bytes(), sorted((tmp_path / "other").glob(kind))[0].read_bytes()))
    names = sorted(f.name for f in (tmp_path / "c").iterdir())
    with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
        again, _ = fitted(dense, plan, tmp_path / "c")
    assert same(plain, again) and sorted(f.name for f in (tmp_path / "c").iterdir()) == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third, done = fitted(dense, plan, tmp_path / "c")
    assert done.details["sums_read"] == 3 and same(plain, third)


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.importance import cache

    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    plain, _ = fitted(dense, plan, None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written .*No space left"):
        model, _ = fitted(dense, plan, tmp_path)
    assert same(plain, model) and not list(tmp_path.iterdir())


def sums(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in folder.glob("sums-*")}


def test_sums_keep_to_the_limit_and_the_beginning_of_a_run_stays(tmp_path: Path) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path / "whole")
    one = max(sums(tmp_path / "whole").values())
    limit = 2.2 * one / 2**30
    for _ in range(2):
        _, done = fitted(dense, plan, tmp_path / "c", cache_limit=limit)
    assert done.details["sums_read"] == 2 == len(sums(tmp_path / "c"))
    before = sums(tmp_path / "c")
    for name in before:
        os.utime(tmp_path / "c" / name, (1, 1))
    model, _ = fitted(dense, plan, tmp_path / "c", cache_limit=limit, token_weights="equal")
    after = sums(tmp_path / "c")
    assert not set(before) & set(after) and sum(after.values()) <= 2.2 * one
    assert same(model, fitted(dense, plan, None, token_weights="equal")[0])
    fitted(dense, plan, tmp_path / "none", cache_limit=0.0)
    assert not sums(tmp_path / "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_triangle_gives_the_matrix_back_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(30, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    gram = x.t() @ x
    gram = gram.triu() + gram.triu(1).t()
    half = upper(gram)
    assert half.shape == (28,) and torch.equal(mirrored(half, 7), gram)


def test_held_out_samples_that_change_change_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    plan = planned(dense, ffn=14)
    fitted(dense, plan, tmp_path)
    monkeypatch.setattr(gathering, "HELD_OUT", 4)
    plain, _ = fitted(dense, plan, None)
    model, done = fitted(dense, plan, tmp_path)
    assert done.details["sums_read"] == 0 and same(plain, model)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Any]:
    def prune(**options: Any) -> Any:
        given = {"calibration": ids(), "criterion": "wanda", "compensation": "least-squares", **options}
        return pyprune.prune(tiny_llama(), cache=str(tmp_path), **given)

    yield prune


def test_the_whole_line_runs_the_calibration_once(line: Any, passes: list[int]) -> None:
    first = line(widths={"ffn": 14}, roles="ffn")
    assert passes
    passes.clear()
    second = line(widths={"ffn": 14}, roles="ffn", round_to=2)
    assert passes == [] and same(first.model, second.model)
    assert second.report.compensation[0]["sums_read"] == 3
    other = line(ratio=0.25, roles="ffn")
    assert "cached" in other.scores.details and other.report.compensation[0]["sums_read"] == 1


def test_every_step_of_iterative_pruning_is_read(line: Any, passes: list[int]) -> None:
    options = {"ratio": 0.2, "roles": "ffn", "iterative_steps": 2}
    first = line(**options)
    passes.clear()
    assert same(line(**options).model, first.model) and passes == []


def test_what_one_step_of_a_run_keeps_stays_for_its_others(tmp_path: Path) -> None:
    first, second = (SumsCache(f, 1.5 * 4000 / 2**30, lambda: 0) for f in [Folder(tmp_path)] * 2)
    alone = SumsCache(tmp_path, 1.5 * 4000 / 2**30, lambda: 0)
    first.keep_weights("dense", {}, {"a": torch.zeros(900)})
    second.keep_weights("gains", {}, {"a": torch.zeros(900)})
    assert first.weights("dense") is not None and second.weights("gains") is None  # no room without removing the first
    alone.keep_weights("gains", {}, {"a": torch.zeros(900)})
    assert first.weights("dense") is None and alone.weights("gains") is not None


def test_what_a_killed_run_was_writing_is_removed_once_nobody_writes_it(tmp_path: Path) -> None:
    kinds = ("sums-{}.safetensors", "walk-{}.json", "scores-{}.safetensors", "measured-{}.json")
    old, new = ([tmp_path / f".{k.format(age)}.abcdef01.partial" for k in kinds] for age in ("old", "new"))
    for file in (*old, *new):
        file.write_bytes(b"half")
    for file in old:
        os.utime(file, (0, 0))
    SumsCache(tmp_path, 1.0, lambda: 0).keep_weights("dense", {}, {"a": torch.zeros(9)})
    assert not any(f.exists() for f in old) and all(f.exists() for f in new)


def test_a_limit_without_a_cache_or_compensation_is_refused(tmp_path: Path) -> None:
    for options in ({"compensation": "least-squares"}, {"cache": str(tmp_path)}):
        with pytest.raises(PyPruneError, match=r"cache_limit 3\.0: bounds what compensation keeps"):
            pyprune.prune(tiny_llama(), widths={"ffn": 14}, calibration=ids(), cache_limit=3, **options)


def test_answers_of_several_runs_stay_together(tmp_path: Path) -> None:
    dense = tiny_llama()
    for n in (14, 12):
        fitted(dense, planned(dense, ffn=n), tmp_path)
    (file,) = tmp_path.glob("walk-*.json")
    assert len(json.loads(file.read_text())["answers"]) == 1 + 2 + 2 * 2 * 2  # whole; the first block's; four blocks'


@pytest.mark.parametrize("target", ["own", "stream"])
def test_blocks_that_share_a_matrix_are_run_in_time(target: str, tmp_path: Path) -> None:
    """What is made up for late would see a shared matrix as a later block left it."""
    dense = tiny_llama(num_hidden_layers=4)
    dense.model.layers[1].mlp.down_proj.weight = dense.model.layers[0].mlp.down_proj.weight
    groups = discover(dense)
    scores = score(dense, groups, ids(8), "l2", roles=["ffn"])
    wide, narrow = (select(groups, scores, widths={"ffn": n}) for n in (14, 10))
    name = "model.layers.2.mlp:ffn"
    others = [c for c in wide.cuts if c.group.name != name]
    assert len(others) == 2  # the shared one, and that of the last layer
    one, two = (Plan((*others, plan[name])) for plan in (wide, narrow))
    fitted(dense, one, tmp_path, target=target)
    plain, _ = fitted(dense, two, None, target=target)
    late, done = fitted(dense, two, tmp_path, target=target)
    assert done.details["sums_read"] == 3 and same(plain, late)

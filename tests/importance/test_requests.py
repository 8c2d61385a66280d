"""What the scoring stage says of its work, and how it refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_llama import llama_groups, tiny_llama
from torch import nn

from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.importance import Scores, load_calibration, score


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> Groups:
    return llama_groups(model.config, model)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (4, 8), generator=torch.Generator().manual_seed(0))


def test_scores_say_how_they_were_made(model: nn.Module, groups: Groups, ids: torch.Tensor) -> None:
    made = load_calibration(ids, batch_size=2)
    scores = score(model, groups, made, "taylor", "mean", roles=["ffn"], seed=5, activation_memory=9)
    details = json.loads(json.dumps(scores.details))
    assert scores.criterion == details["criterion"] == "param_first"
    assert (details["aggregation"], details["seed"], details["dtype"]) == ("mean", 5, "float32")
    assert details["calibration"] == made.to_dict()
    assert details["engine"] == "block sweep" and details["recomputed_blocks"] == 0
    assert details["seconds"] > 0 and details["peak_memory"] > 2**20
    with torch.no_grad():
        want = model(input_ids=ids, labels=ids).loss
    assert details["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_scores_are_float32_finite_and_cover_the_groups_asked(
    model: nn.Module, groups: Groups, ids: torch.Tensor
) -> None:
    scores = score(model, groups, ids)
    assert list(scores) == [g.name for g in groups]
    for group in groups:
        values = scores[group.name]
        assert values.shape == (group.outer, group.units) and values.dtype == torch.float32
        assert values.isfinite().all() and (values >= 0).all() and values.device.type == "cpu"
    assert list(score(model, groups, ids, roles=["kv_heads"], layers=[2])) == ["model.layers.2.self_attn:kv_heads"]


def test_saved_scores_come_back_bit_for_bit(
    model: nn.Module, groups: Groups, ids: torch.Tensor, tmp_path: Path
) -> None:
    scores = score(model, groups, ids, "param_mix")
    scores.save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")
    assert read.criterion == scores.criterion and read.details == scores.details
    assert set(read) == set(scores) and all(torch.equal(read[n], scores[n]) for n in scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "param_frist"}, "criterion 'param_frist': is not known.*Did you mean 'param_first'"),
        ({"aggregation": "summ"}, "aggregation 'summ': is not known.*Did you mean 'sum'"),
        ({"batches": None}, "calibration: is needed by criterion 'param_first'.*l1, l2 or random"),
        ({"batches": "train.txt"}, "batches 'train.txt': is a name"),
        ({"roles": ["experts"]}, "roles: leave no group to score.*kv_heads, ffn, hidden"),
        ({"layers": [9], "roles": ["ffn"]}, "leave no group"),
        ({"activation_memory": -1}, "activation_memory -1: must be"),
        ({"activation_memory": float("nan")}, "activation_memory nan: must be"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    model: nn.Module, groups: Groups, ids: torch.Tensor, changes: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"batches": ids, **changes}
    with pytest.raises(PyPruneError, match=message) as error:
        score(model, groups, **options)
    assert "\n" not in str(error.value)


def test_groups_of_another_model_are_refused(groups: Groups, ids: torch.Tensor) -> None:
    with pytest.raises(PyPruneError, match=r"has shape \[20, 32\], and the groups speak of \[24, 32\]"):
        score(tiny_llama(intermediate_size=20), groups, ids, roles=["ffn"])
    with pytest.raises(PyPruneError, match=r"layers\.2.*is not a parameter of this model"):
        score(tiny_llama(num_hidden_layers=2), groups, ids, roles=["ffn"], layers=[2])


def test_a_model_without_logits_is_refused(groups: Groups, model: nn.Module, ids: torch.Tensor) -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": self.model(input_ids).last_hidden_state}

    with pytest.raises(PyPruneError, match=r"in place of logits.*causal-LM head"):
        score(Headless(), groups, ids, roles=["ffn"])


def test_labels_of_another_length_than_the_logits_are_refused(
    groups: Groups, model: nn.Module, ids: torch.Tensor
) -> None:
    with pytest.raises(PyPruneError, match=r"are logits that do not fit labels \[1, 5\]"):
        score(model, groups, [{"input_ids": ids, "labels": ids[:, :5]}], roles=["ffn"])


def test_weights_on_the_meta_device_and_integer_weights_are_refused(groups: Groups, ids: torch.Tensor) -> None:
    with pytest.raises(PyPruneError, match="has weights that are not in memory"):
        score(tiny_llama().to("meta"), groups, ids)
    quantised = tiny_llama()
    layer = quantised.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PyPruneError, match=r"mlp\.up_proj\.weight.*int8, which has no gradient"):
        score(quantised, groups, ids)


def test_weights_whose_squares_overflow_are_not_said_to_have_gradients(groups: Groups) -> None:
    large = tiny_llama()
    with torch.no_grad():
        large.model.layers[1].mlp.up_proj.weight.mul_(1e22)
    with pytest.raises(PyPruneError, match=r"layers\.1\.mlp\.up_proj.*whose l2 score is beyond float32"):
        score(large, groups, criterion="l2")

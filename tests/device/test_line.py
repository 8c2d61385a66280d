"""The whole line on a GPU, real or pretended (``make test-device``), beside the same on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_mixtures import mixture
from helpers_run import tiny_llama, write_model, write_text
from torch import Tensor

import pyprune
from pyprune.compensation import compensate

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device (make test-device)"),
]

FOLDER_OPTIONS: dict[str, dict[str, Any]] = {
    "a ratio alone": {},
    "knapsack": {"method": "best", "allocation": "knapsack"},
    "heads too": {"ratio": 0.5},
    "search": {"criterion": "wanda", "allocation": "search", "search_steps": 4, "compensation": "least-squares"},
    "divergence": {"criterion": "l2", "allocation": "divergence"},
    "global": {"criterion": "param_second", "allocation": "global"},
    "group_fisher": {"criterion": "group_fisher", "compensation": "obs", "roles": ["ffn"]},
    "from gradients": {"criterion": "param_mix", "route": "gradients"},
    "in steps": {"criterion": "token_fisher", "iterative_steps": 2},
    "values": {"ratio": None, "widths": {"vo_dim": 6}, "value_basis": "principal", "compensation": "least-squares"},
    "layers": {"ratio": None, "remove_layers": 1},
    "the dense stream": {"criterion": "flap", "compensation": "least-squares", "compensation_target": "stream"},
    "hidden channels": {"ratio": None, "widths": {"hidden": 0.75}, "method": "plain"},
    "streamed": {"stream": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line")
    write_model(root / "model")
    write_text(root / "train.txt")
    write_text(root / "test.txt", 4000, skip=40_000)
    return root


def everywhere(model: Any) -> set[str]:
    tensors = [*model.parameters(), *model.buffers()]
    return {t.device.type for t in tensors}


def test_the_device_is_another_one() -> None:
    """The check of the check."""
    there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    for mistake in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there[None] @ here[:, None]):
        with pytest.raises(RuntimeError, match="on the same device"):
            mistake()
    with pytest.raises(RuntimeError):
        there.index_select(0, torch.tensor([1]))
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert torch.equal((there + 1).cpu(), here + 1) and torch.equal(there[torch.tensor([1, 2])].cpu(), here[1:3])


@pytest.mark.parametrize("options", FOLDER_OPTIONS.values(), ids=FOLDER_OPTIONS)
def test_a_folder_is_pruned_as_on_the_cpu(options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    given = {"ratio": 0.2, "calibration": str(place / "train.txt"), "samples": 8, "length": 32, **options}
    if "stream" not in options:
        given |= {"eval_text": str(place / "test.txt"), "eval_length": 64, "eval_windows": 2}
    there = pyprune.prune(place / "model", **given, output_dir=str(tmp_path / "there"))
    here = pyprune.prune(place / "model", **given, device="cpu", output_dir=str(tmp_path / "here"))
    assert there.model is None or everywhere(there.model) == {"cuda"}  # None where it was streamed to the disk
    if there.report.perplexity is not None:
        found = [r.report.perplexity["after"]["perplexity"] for r in (there, here)]
        assert found[0] == pytest.approx(found[1], rel=0.02)
    counts = [r.report.parameters["with_embeddings"]["after"] for r in (there, here)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
    files = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("there", "here")]
    assert files[0] == files[1]


CRITERIA = ["random", "l1", "l2", "vectorize", "param_first", "param_second", "param_mix", "group_fisher",
            "token_fisher", "wanda", "flap", "obs"]  # fmt: skip


def tokens(samples: int = 8, length: int = 24, vocabulary: int = 101) -> Tensor:
    return torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1))


def same_scores(model: Any, criterion: str, roles: tuple[str, ...] = ("kv_heads", "ffn"), **options: Any) -> None:
    groups = pyprune.discover(model)
    there_are = {g.role for g in groups}
    options["roles"] = [r for r in roles if r in there_are]
    here = pyprune.score(model, groups, tokens(), criterion, **options)
    there = pyprune.score(model.to("cuda"), groups, tokens(), criterion, **options)
    for name, values in here.by_group.items():
        torch.testing.assert_close(there.by_group[name].cpu(), values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_model_there_is_scored_by_token_ids_of_the_cpu(criterion: str) -> None:
    same_scores(tiny_llama(), criterion)


@pytest.mark.parametrize("criterion", ["param_first", "param_second"])
def test_gradients_give_the_same_there(criterion: str) -> None:
    same_scores(tiny_llama(), criterion, route="gradients")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("criterion", ["param_second", "wanda"])
def test_mixtures_are_scored_there(family: str, criterion: str) -> None:
    same_scores(mixture(family), criterion)


def test_experts_are_scored_there() -> None:
    same_scores(mixture("mixtral"), "reap", roles=("experts",))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_slicing_equals_masking_there(family: str) -> None:
    model = mixture(family).to("cuda")
    groups = pyprune.discover(model)
    plan = pyprune.select(groups, pyprune.score(model, groups, criterion="l2"), 0.3)
    assert everywhere(pyprune.apply(model, plan)) == {"cuda"}  # which compares the two


@pytest.mark.parametrize("how", ["least-squares", "obs", "bias"])
def test_a_cut_is_made_up_for_there(how: str) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    groups = pyprune.discover(model)
    scores = pyprune.score(model, groups, tokens(), "wanda", roles=["kv_heads", "ffn"])
    plan = pyprune.select(groups, scores, 0.3, roles=["kv_heads", "ffn"])
    there, here = copy.deepcopy(model).to("cuda"), model
    for one in (there, here):
        compensate(one, plan, tokens(), how)
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


def test_a_model_is_trained_and_measured_there(place: Path, tmp_path: Path) -> None:
    out = pyprune.recover(
        place / "model", data=str(place / "train.txt"), max_minutes=0.2, output_dir=str(tmp_path / "recovered"),
        cutoff=64, teacher=str(place / "model"), bf16=False,
    )  # fmt: skip
    found = pyprune.evaluate(
        tmp_path / "recovered", compare=place / "model", eval_text=str(place / "test.txt"), eval_length=64, speed=True,
        speed_prompt=8, speed_tokens=4, prompt="The",
    )  # fmt: skip
    assert everywhere(out.model) == {"cuda"}
    assert found["speed"]["device"].startswith("cuda")

"""Wanda, FLAP and OBS against their formulas on inputs caught by hooks, and what removing a unit really costs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_llama import llama_groups, tiny_llama
from torch import Tensor, nn

from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.importance import score
from pyprune.importance.criteria.obs import DAMPING
from pyprune.importance.steps import make_steps
from pyprune.importance.walk import weigh_tokens

LAYER = 1
FFN, HEADS = f"model.layers.{LAYER}.mlp:ffn", f"model.layers.{LAYER}.self_attn:kv_heads"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> Groups:
    return llama_groups(model.config, model)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (12, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def seen(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Inputs of the two projections [tokens, inputs] and the stream behind the layer [tokens, hidden], float64."""
    double, out = copy.deepcopy(model).double(), {}
    layer = double.model.layers[LAYER]
    for name, module in (("ffn", layer.mlp.down_proj), ("heads", layer.self_attn.o_proj)):
        module.register_forward_pre_hook(lambda m, args, n=name: out.update({n: args[0].flatten(0, 1)}))
    layer.register_forward_hook(lambda m, args, y: out.update(stream=y.flatten(0, 1)))
    with torch.no_grad():
        double(ids)
    return out


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    layer = model.model.layers[LAYER]
    found = {"ffn": layer.mlp.down_proj.weight, "heads": layer.self_attn.o_proj.weight}
    return {k: w.detach().double() for k, w in found.items()}


def units(columns: Tensor, count: int) -> Tensor:
    return columns.reshape(count, -1).sum(1)[None]


@pytest.mark.parametrize("weighting", ["equal", "inverse", "sink"])
@pytest.mark.parametrize("criterion", ["wanda", "flap"])
def test_moment_criteria_are_their_formulas(
    model: nn.Module, groups: Groups, ids: Tensor, seen: dict[str, Tensor], criterion: str, weighting: str
) -> None:
    got = score(model, groups, ids, criterion, roles=["ffn", "kv_heads"], token_weights=weighting)
    w = torch.ones(len(ids.flatten())).double() if weighting == "equal" else 1 / seen["stream"].square().mean(1)
    if weighting == "sink":
        w[:: ids.shape[1]] *= ids.shape[1] / 8
    for name, kind, count in ((FFN, "ffn", 24), (HEADS, "heads", 2)):
        x = seen[kind]
        centre = 0 if criterion == "wanda" else (w[:, None] * x).sum(0) / w.sum()
        power = (w[:, None] * (x - centre).square()).mean(0)
        want = units(power * weights_of(model)[kind].square().sum(0), count)
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-7)


def test_obs_is_the_least_error_after_the_others_are_refitted(
    model: nn.Module, groups: Groups, ids: Tensor, seen: dict[str, Tensor]
) -> None:
    got = score(model, groups, ids, "obs", roles=["ffn", "kv_heads"], token_weights="equal")
    for name, kind, count in ((FFN, "ffn", 24), (HEADS, "heads", 2)):
        x, weight = seen[kind], weights_of(model)[kind]
        size = x.shape[1]
        h = x.t() @ x / len(x)
        h += DAMPING * h.diagonal().mean() * torch.eye(size)
        root = torch.linalg.cholesky(h).t()  # |root (W' - W)^T|^2 is the damped error
        for unit in range(count):
            kept = [j for j in range(size) if j // (size // count) != unit]
            best = torch.linalg.lstsq(root[:, kept], root @ weight.t()).solution
            want = (root[:, kept] @ best - root @ weight.t()).square().sum()
            assert got[name][0, unit].item() == pytest.approx(want.item(), rel=1e-3)


def test_wanda_is_what_the_output_loses_when_one_channel_goes(
    model: nn.Module, groups: Groups, ids: Tensor, seen: dict[str, Tensor]
) -> None:
    got = score(model, groups, ids, "wanda", roles=["ffn"], token_weights="equal")[FFN][0]
    for j in (0, 7, 23):
        lost = seen["ffn"][:, j : j + 1] * weights_of(model)["ffn"][:, j]
        assert got[j].item() == pytest.approx(lost.square().sum(1).mean().item(), rel=1e-4)


def test_batches_do_not_change_the_scores(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    one = score(model, groups, ids, "obs", roles=["ffn"])
    two = score(model, groups, [ids[:5], ids[5:]], "obs", roles=["ffn"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6)


def test_dead_channels_score_zero_and_nothing_is_nan(groups: Groups, ids: Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[LAYER].mlp.up_proj.weight[3] = 0
        model.model.layers[0].mlp.up_proj.weight.zero_()
    for criterion in ("wanda", "flap", "obs"):
        got = score(model, groups, ids, criterion, roles=["ffn"])
        assert got["model.layers.0.mlp:ffn"].eq(0).all()
        assert all(v.isfinite().all() and (v >= 0).all() for v in got.values())
        if criterion != "obs":
            assert got[FFN][0, 3] == 0


def test_the_model_is_left_as_it_was(groups: Groups, ids: Tensor) -> None:
    model = tiny_llama().train()
    before = copy.deepcopy(model.state_dict())
    score(model, groups, ids, "wanda", roles=["ffn"])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_are_comparable_by_the_share_of_the_stream_that_is_lost(groups: Groups, ids: Tensor) -> None:
    """With a stream a hundred times as long, and nothing else longer, what layers add to it is worth less."""
    quiet, loud = tiny_llama(), tiny_llama()
    with torch.no_grad():
        loud.model.embed_tokens.weight.mul_(100)
    one, two = (score(m, groups, ids, "wanda", roles=["ffn"]) for m in (quiet, loud))
    assert two[FFN].sum() < 0.1 * one[FFN].sum()


def test_mistakes_are_named(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    for option, given in (
        ("calibration", {"batches": None}), ("route", {"route": "gradients"}),
        ("token_weights", {"token_weights": "norm"}),
        ("criterion", {"roles": ["layers"]}), ("calibration", {"batches": ids + 97}),
    ):  # fmt: skip
        options = {"batches": ids, "roles": ["ffn"], **given}
        if given.get("roles"):
            from pyprune import discover

            options["groups"] = discover(model)
        with pytest.raises(PyPruneError) as error:
            score(model, options.pop("groups", groups), options.pop("batches"), "wanda", **options)
        assert error.value.option == option


def test_the_first_token_behind_padding_is_the_sink() -> None:
    mask = torch.ones(3, 32, dtype=torch.int64)
    mask[1, :8] = 0
    mask[2, 4:] = 0
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    (step,) = make_steps([batch], torch.device("cpu"), tokens=96)
    stream = 1 + torch.rand(3, 32, 5, generator=torch.Generator().manual_seed(0))
    plain, found = (weigh_tokens(step, stream, how).view(3, 32) for how in ("inverse", "sink"))
    want = torch.ones(3, 32)
    want[0, 0], want[1, 8] = 32 / 8, 24 / 8  # of four tokens an eighth is less than one: no less than before
    assert torch.equal(found, plain * want) and (plain[mask == 0] == 0).all()


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_scores_say_how_tokens_counted_where_blocks_cannot_be_run_alone(criterion: str, ids: Tensor) -> None:
    """Streams behind blocks, which the default looks at, are not to be seen then."""
    model = tiny_llama()
    groups, roles = llama_groups(model.config, model), ["ffn", "kv_heads"]
    equal = score(model, groups, ids, criterion, roles=roles, token_weights="equal")
    model.model.layers[0].register_full_backward_hook(lambda module, given, taken: None)
    got = score(model, groups, ids, criterion, roles=roles)
    assert got.details["engine"].startswith("the model as a whole") and got.details["token_weights"] == "equal"
    for name in equal:
        torch.testing.assert_close(got[name], equal[name], rtol=1e-4, atol=1e-6)


def test_embeddings_with_labels_are_scored_as_their_tokens(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids).detach()
    batches = [{"inputs_embeds": e, "labels": t} for e, t in zip(embeds.split(4), ids.split(4), strict=True)]
    expected, got = (score(model, groups, given, "wanda", roles=["ffn", "kv_heads"]) for given in (ids, batches))
    assert got.details["engine"] == "one block at a time"
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)

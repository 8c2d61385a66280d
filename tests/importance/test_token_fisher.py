"""token_fisher against masks that autograd differentiates, and against the Fisher information itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from torch import Tensor, nn

from pyprune import discover, score
from pyprune.errors import PyPruneError
from pyprune.importance import token_scores

TOKENS = 12


def ids(samples: int = 4, length: int = TOKENS, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_inner=24, n_positions=32, initializer_range=0.3,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def masked_log_probabilities(model: nn.Module, tokens: Tensor, reader: nn.Module, units: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [samples, length, vocabulary]; the mask [samples, length, units] of what ``reader`` reads."""
    mask = torch.ones(*tokens.shape, units, dtype=next(model.parameters()).dtype, requires_grad=True)

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0] * mask.repeat_interleave(args[0].shape[-1] // units, dim=-1),)

    hook = reader.register_forward_pre_hook(multiply)
    try:
        return model(tokens).logits.log_softmax(-1), mask
    finally:
        hook.remove()


def next_labels(logits: Tensor, random: torch.Generator) -> Tensor:
    """In place of drawn labels: number 5 everywhere."""
    seed = logits.softmax(-1)
    seed[:, 5] -= 1
    return seed


@pytest.mark.parametrize(
    ("make", "group", "reader", "units"),
    [
        (tiny_llama, "model.layers.1.mlp:ffn", "model.layers.1.mlp.down_proj", 24),
        (tiny_llama, "model.layers.0.self_attn:kv_heads", "model.layers.0.self_attn.o_proj", 2),
        (gpt2, "transformer.h.1.mlp:ffn", "transformer.h.1.mlp.c_proj", 24),
    ],
    ids=["channels", "heads", "transposed"],
)
def test_it_is_the_mean_square_of_the_gradient_of_a_mask_at_every_token(
    make: Any, group: str, reader: str, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "_drawn_seed", next_labels)
    model = make().double()
    groups = discover(model)
    logs, mask = masked_log_probabilities(model, ids(), model.get_submodule(reader), units)
    (-logs[..., 5].sum()).backward()
    assert mask.grad is not None
    found = score(model, groups, ids(), "token_fisher", roles=[groups[group].role])[group]
    torch.testing.assert_close(found[0].double(), mask.grad.square().mean((0, 1)), rtol=1e-5, atol=1e-9)


def test_over_drawn_labels_it_is_the_fisher_information_of_the_mask() -> None:
    """Labels of one sample are drawn anew for each of its copies; the Fisher matrix's diagonal needs no labels."""
    model, one = tiny_llama().double(), ids(1, 6)
    logs, mask = masked_log_probabilities(model, one, model.model.layers[1].mlp.down_proj, 24)
    want = torch.zeros(6, 24, dtype=torch.float64)
    for position in range(6):
        for label in range(97):
            (grad,) = torch.autograd.grad(logs[0, position, label], mask, retain_graph=True)
            want += logs[0, position, label].exp().detach() * grad[0].square()
    found = score(model, discover(model), one.repeat(600, 1), "token_fisher", roles=["ffn"])["model.layers.1.mlp:ffn"]
    assert float((found[0] / want.mean(0) - 1).abs().max()) < 0.25
    assert float((found[0].double().sum() / want.mean(0).sum() - 1).abs()) < 0.05


def test_labels_come_from_the_seed() -> None:
    model = tiny_llama()
    groups = discover(model)
    one, same, other = (score(model, groups, ids(), "token_fisher", roles=["ffn"], seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one) and not all(torch.equal(one[n], other[n]) for n in one)


def test_padding_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "_drawn_seed", next_labels)
    model = tiny_llama()
    groups, tokens = discover(model), ids(2)
    padded = torch.cat([tokens, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    wanted = score(model, groups, tokens, "token_fisher", roles=["ffn", "kv_heads"])
    found = score(
        model, groups, [{"input_ids": padded, "attention_mask": mask}], "token_fisher", roles=["ffn", "kv_heads"]
    )
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-9)


def test_channels_of_stacked_experts_have_scores() -> None:
    """A channel that no expert's projection reads is worth nothing; all others are worth something."""
    model = mixture("mixtral")
    readers = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    for p in readers:
        p.data[:, :, 3] = 0
    found = score(model, discover(model), ids(vocabulary=101), "token_fisher", roles=["expert_ffn"])
    assert len(found) == len(readers) == 2
    for values in found.values():
        assert values.reshape(-1, 24).eq(0).nonzero()[:, 1].tolist() == [3] * (values.numel() // 24)


def test_a_model_whose_blocks_are_not_found_is_taken_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.importance.blocks import NotSweepable

    model = tiny_llama()
    groups = discover(model)
    wanted = score(model, groups, ids(), "token_fisher", roles=["ffn"])

    def none(model: nn.Module) -> list[nn.Module]:
        raise NotSweepable("no list")

    monkeypatch.setattr(token_scores, "find_blocks", none)
    found = score(model, groups, ids(), "token_fisher", roles=["ffn"])
    assert found.details["engine"] == "the model as a whole: no list"
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    before = copy.deepcopy(model.state_dict())
    score(model, discover(model), ids(), "token_fisher", roles=["ffn"])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("option", "given"),
    [("calibration", {"batches": None}), ("route", {"route": "gradients"}), ("criterion", {"roles": ["layers"]})],
)
def test_mistakes_are_named(option: str, given: dict[str, Any]) -> None:
    model = tiny_llama()
    options = {"batches": ids(), "roles": ["ffn"], **given}
    with pytest.raises(PyPruneError) as error:
        score(model, discover(model), options.pop("batches"), "token_fisher", **options)
    assert error.value.option == option


def test_nan_in_logits_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(PyPruneError, match="NaN or infinity"):
        score(model, discover(model), ids(), "token_fisher", roles=["ffn"])


def test_steps_are_small_where_the_vocabulary_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    drawn = token_scores._drawn_seed

    def counted(logits: Tensor, random: torch.Generator) -> Tensor:
        seen.append(len(logits))
        return drawn(logits, random)

    monkeypatch.setattr(token_scores, "_drawn_seed", counted)
    model = tiny_llama()
    for room in (97 * 4 * 2 * TOKENS, 97 * 4):  # logits of two samples; of one token, where a sample is the least
        monkeypatch.setattr(token_scores, "LOGIT_BYTES", room)
        score(model, discover(model), ids(4), "token_fisher", roles=["ffn"])
    assert seen == [2 * TOKENS] * 2 + [TOKENS] * 4

"""A part of a large vocabulary in place of all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_compensation import ids
from helpers_llama import tiny_llama
from torch import nn

from pyprune.compensation import gains
from pyprune.importance import words as module
from pyprune.importance.calibration import load_calibration
from pyprune.importance.steps import Forward, make_steps


@pytest.fixture(autouse=True)
def forty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORDS", 40)  # of 97


def steps(samples: int = 6) -> Any:
    return make_steps(load_calibration(ids(samples, 16)), torch.device("cpu"), tokens=16)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_likely_tokens_are_those_with_most_probability_and_keep_their_logits(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    tokens = ids(6, 16)
    whole = model(tokens).logits
    found = module.likely(Forward(model), steps())
    wanted = whole.double().softmax(-1).sum((0, 1)).topk(40).indices
    assert found is not None and found.tolist() == sorted(wanted.tolist())
    narrow = module.narrowed(model, found)
    for _ in range(2):
        with narrow:
            torch.testing.assert_close(model(tokens).logits, whole[..., found])
    torch.testing.assert_close(model(tokens).logits, whole)


def test_gradients_pass_to_the_stream() -> None:
    model, chosen = tiny_llama(), torch.arange(0, 80, 2)
    seen = []
    for narrow in (module.narrowed(model, chosen), module.narrowed(model, None)):
        model.zero_grad()
        with narrow:
            logits = model(ids(2, 16)).logits
        (logits if logits.shape[-1] == 40 else logits[..., chosen]).square().sum().backward()
        seen.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
    torch.testing.assert_close(*seen)


def test_all_tokens_take_part_where_there_are_few_or_a_second_head_would_be_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    hidden, tokens = model.config.hidden_size, 16
    monkeypatch.setattr(module, "WORDS", 97)
    assert module.likely(Forward(model), steps()) is None
    fair = 2 * tokens * 97 / (hidden + 2 * tokens)  # where both are as large
    monkeypatch.setattr(module, "WORDS", int(fair) + 1)
    assert module.likely(Forward(model), steps()) is None
    monkeypatch.setattr(module, "WORDS", int(fair))
    assert module.likely(Forward(model), steps()) is not None


def test_logits_that_are_made_of_more_than_the_head_stay_whole() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.get_output_embeddings = self.inner.get_output_embeddings

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            logits = self.inner(input_ids).logits
            return torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)

    assert module.likely(Forward(Padded()), steps()) is None


class Behind(nn.Module):
    """A model that does something to the logits behind the head; ``widths`` are those that it saw."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.change = tiny_llama(), change
        self.get_output_embeddings = self.inner.get_output_embeddings
        self.widths: set[int] = set()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.inner(input_ids).logits
        self.widths.add(logits.shape[-1])
        return self.change(logits)


def masked(*numbers: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(logits: torch.Tensor) -> torch.Tensor:
        logits[..., list(numbers)] = torch.finfo(logits.dtype).min
        return logits

    return change


BIAS = torch.randn(97, generator=torch.Generator().manual_seed(0))
MORE_THAN_THE_HEAD = {
    "a bias": lambda logits: logits + BIAS,
    "a fixed shape": lambda logits: logits.view(*logits.shape[:2], 97),
    "masked, within the part": masked(5, 6),
    "masked, beyond the part": masked(90, 91),
}


@pytest.mark.parametrize("what", MORE_THAN_THE_HEAD)
def test_logits_with_a_bias_a_mask_or_a_shape_of_their_own_stay_whole(what: str) -> None:
    model = Behind(MORE_THAN_THE_HEAD[what])
    assert module.likely(Forward(model), steps()) is None
    assert what == "a fixed shape" or model.widths == {97}  # ids out of range end the process on a GPU


def test_what_treats_all_tokens_alike_behind_the_head_leaves_a_part() -> None:
    model = Behind(lambda logits: torch.tanh(logits / 3) * 3)
    found = module.likely(Forward(model), steps())
    assert found is not None and len(found) == 40 and model.widths == {40, 97}


def test_gains_of_a_part_of_the_vocabulary_bring_the_whole_nearer(tmp_path: Any) -> None:
    import copy

    dense = tiny_llama()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.6)
    text, unseen = load_calibration(ids(40, 16)), ids(10, 16, seed=7)

    def off() -> float:
        with torch.no_grad():
            p, q = (m(unseen).logits.double().log_softmax(-1) for m in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before, says = off(), gains.reference(dense, text, tmp_path)
    assert says.words is not None and len(says.words) == 40
    again = gains.reference(dense, text, tmp_path)
    assert again.words is not None and torch.equal(again.words, says.words)
    found = gains.fit_gains(model, again)
    assert found.kept and off() < 0.3 * before

"""Perplexity against a reference written here, its protocol, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_run import tiny_llama
from torch import nn

from pyprune.errors import PyPruneError
from pyprune.evaluation import logits as logits_module
from pyprune.evaluation.logits import can_split, logit_pieces
from pyprune.evaluation.perplexity import Perplexity, cut_windows, perplexity


def tokens(count: int, vocabulary: int = 258) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference_nll(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean negative log-likelihood of tokens 2..n of each window, float64 softmax over whole logits."""
    total, count = 0.0, 0
    for window in windows:
        out = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        for t in range(1, len(window)):
            total -= out[t - 1, window[t]].item()
            count += 1
    return total / count


def test_matches_the_definition_token_by_token() -> None:
    model, windows = tiny_llama(), cut_windows(tokens(100), 16)
    result = perplexity(model, windows, text="x.txt")
    assert result.nll == pytest.approx(reference_nll(model, windows), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.windows, result.length, result.tokens, result.text, result.dtype) == (6, 16, 90, "x.txt", "float32")


@pytest.mark.parametrize("prefix", [[1], [3, 5]])
def test_what_windows_begin_with_is_read_and_not_scored(prefix: list[int]) -> None:
    model, windows = tiny_llama(), cut_windows(tokens(90), 15)
    result = perplexity(model, windows, prefix=prefix)
    total = 0.0
    with torch.no_grad():
        for window in windows:
            out = model(torch.cat([torch.tensor(prefix), window])[None]).logits[0].double().log_softmax(-1)
            total -= out[len(prefix) - 1 : -1].gather(1, window[:, None]).sum().item()
    assert result.nll == pytest.approx(total / windows.numel(), rel=1e-5)
    assert (result.length, result.tokens, result.prefix) == (15 + len(prefix), 90, len(prefix))
    assert f"tokens {len(prefix) + 1}..{15 + len(prefix)} scored (90)" in result.protocol
    assert "each begun as the tokenizer begins texts" in result.protocol


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batch_size_does_not_change_it(batch_size: int) -> None:
    model, windows = tiny_llama(), cut_windows(tokens(100), 16)
    one, many = perplexity(model, windows), perplexity(model, windows, batch_size=batch_size)
    assert many.nll == pytest.approx(one.nll, rel=1e-5)
    assert many.tokens == one.tokens


def test_pieces_of_the_sequence_give_the_same_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_llama(), cut_windows(tokens(128), 64)
    whole = perplexity(model, windows)
    monkeypatch.setattr(logits_module, "PIECE_BYTES", 4 * 258 * 10)  # ten positions at a time
    sizes = [part.shape[1] for _, part in logit_pieces(model, windows[:1], split=True)]
    assert sizes == [10, 10, 10, 10, 10, 10, 4]
    assert perplexity(model, windows).nll == pytest.approx(whole.nll, rel=1e-5)


def test_the_heads_own_soft_cap_is_part_of_the_pieces() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    windows = cut_windows(tokens(64), 32)
    assert can_split(model, windows[:1])
    assert perplexity(model, windows).nll == pytest.approx(reference_nll(model, windows), rel=1e-5)


def test_a_model_whose_head_reads_more_than_the_decoder_is_run_whole() -> None:
    class Odd(type(tiny_llama())):
        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits + input_ids.shape[1]  # depends on the whole sequence's length
            out.logits[..., 0] += 3.0 * input_ids.shape[1]
            return out

    model = tiny_llama()
    model.__class__ = Odd
    windows = cut_windows(tokens(64), 32)
    assert not can_split(model, windows[:1])
    assert perplexity(model, windows).nll == pytest.approx(reference_nll(model, windows), rel=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    perplexity(model, cut_windows(tokens(64), 32))
    assert model.training and model.model.layers[0].training and not model.model.layers[1].mlp.training
    assert "forward" not in vars(model.get_decoder())
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_summed_in_higher_precision() -> None:
    model, windows = tiny_llama().to(torch.bfloat16), cut_windows(tokens(256), 64)
    result = perplexity(model, windows)
    assert result.dtype == "bfloat16"
    assert result.nll == pytest.approx(reference_nll(model, windows), rel=1e-3)


def test_an_overflowing_perplexity_stays_json() -> None:
    result = Perplexity(math.inf, 800.0, 10, 1, 11, "x", "float32")
    assert result.to_dict()["perplexity"] is None
    assert result.to_dict()["nll"] == 800.0


def test_logits_that_are_not_finite_stay_json() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    found = perplexity(model, cut_windows(tokens(64), 32)).to_dict()
    assert found["perplexity"] is None and math.isfinite(found["nll"])


def test_a_forward_that_somebody_gave_the_decoder_stays() -> None:
    model = tiny_llama()
    decoder, calls = model.get_decoder(), []
    own = decoder.forward
    decoder.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    given = decoder.forward
    perplexity(model, cut_windows(tokens(64), 32))
    assert decoder.forward is given and calls


@pytest.mark.parametrize("bad", [300, -1])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    windows = cut_windows(tokens(64), 32)
    windows[1, 3] = bad
    with pytest.raises(PyPruneError, match=f"holds token id {bad}"):
        perplexity(tiny_llama(), windows)


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert cut_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(torch.arange(11), 4, windows=1).tolist() == [[0, 1, 2, 3]]


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(PyPruneError, match=r"eval_text 'a.txt': has 5 tokens, too few for one window of 8"):
        cut_windows(torch.arange(5), 8, text="a.txt")


def test_more_windows_than_there_are_is_refused() -> None:
    with pytest.raises(PyPruneError, match=r"eval_windows 9: is more than a.txt holds: 2 windows of 8 tokens"):
        cut_windows(torch.arange(20), 8, windows=9, text="a.txt")


def test_the_protocol_says_everything_that_the_figure_depends_on() -> None:
    protocol = perplexity(tiny_llama(), cut_windows(tokens(40), 20), text="wiki.txt").protocol
    for part in ("wiki.txt", "2 windows of 20 tokens", "38", "no overlap", "no special tokens", "float32"):
        assert part in protocol

"""Rows: what is in them, and that the documents of a row do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_recovery import rows, sentences, small_llama
from helpers_run import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from pyprune.recovery.examples import Encoder, Example
from pyprune.recovery.loss import training_loss
from pyprune.recovery.packing import IGNORED, collate, isolates, pieces, rows_of


def example(length: int, whole: bool = False, prompt: int = 1) -> Example:
    return Example(np.arange(length) + 3, np.arange(length) >= prompt, whole)


def test_long_text_is_split_and_the_first_token_of_a_piece_is_not_learned() -> None:
    found = pieces(example(23), 10)
    assert [len(p.ids) for p in found] == [10, 10, 3]
    assert np.concatenate([p.ids for p in found]).tolist() == (np.arange(23) + 3).tolist()
    assert [int((~p.learned).sum()) for p in found] == [1, 1, 1]


def test_a_long_answer_is_cut_at_its_end() -> None:
    (only,) = pieces(example(23, whole=True, prompt=4), 10)
    assert len(only.ids) == 10 and only.learned.tolist() == [False] * 4 + [True] * 6


def test_an_instruction_whose_prompt_fills_the_row_teaches_nothing() -> None:
    assert pieces(example(23, whole=True, prompt=10), 10) == []
    assert pieces(example(1), 10) == []


@given(st.lists(st.integers(2, 16), max_size=60), st.booleans())
def test_rows_hold_every_document_whole_and_once(lengths: list[int], packing: bool) -> None:
    made = rows_of([example(n) for n in lengths], 16, packing)
    assert all(len(r.ids) <= 16 for r in made)
    found = sorted(n for r in made for n in np.diff([*np.flatnonzero(r.positions == 0), len(r.ids)]).tolist())
    assert found == sorted(lengths)
    assert sum(r.learned for r in made) == sum(lengths) - len(lengths)
    if not packing:
        assert len(made) == len(lengths)


def test_packing_fills_rows() -> None:
    packed, single = rows(200, 128, packing=True), rows(200, 128, packing=False)
    assert len(packed) < len(single)
    assert sum(len(r.ids) for r in packed) / (128 * len(packed)) > 0.8


def test_padding_is_a_document_of_its_own_without_loss() -> None:
    a, b = rows_of([example(3), example(5)], 5, packing=False)
    batch = collate([a, b], positions=True)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["labels"][0].tolist() == [IGNORED, 4, 5, IGNORED, IGNORED]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1]
    assert "position_ids" not in collate([a], positions=False)


def losses(model, given) -> tuple[torch.Tensor, int]:
    batch = collate(given, positions=True)
    labels = batch.pop("labels")
    return training_loss(model(**batch, use_cache=False).logits, labels), sum(r.learned for r in given)


def test_the_loss_of_packed_documents_is_that_of_each_alone() -> None:
    encode = Encoder(byte_tokenizer())
    documents = [encode(r, "here") for r in sentences(12)]
    packed, single = rows_of(documents, 128, True), rows_of(documents, 128, False)
    assert len(packed) < len(single)
    model = small_llama()
    with torch.no_grad():
        (a, n), (b, m) = losses(model, packed), losses(model, single)
    assert n == m
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_another_document_in_the_row_changes_no_bit_of_the_next_ones_logits() -> None:
    model = small_llama()
    ids = torch.arange(20)[None] + 5
    other = torch.cat([ids[:, :8] + 50, ids[:, 8:]], dim=1)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        a, b = (model(input_ids=i, position_ids=places, use_cache=False).logits for i in (ids, other))
        leaky = [model(input_ids=i, use_cache=False).logits for i in (ids, other)]
    assert torch.equal(a[:, 8:], b[:, 8:])
    assert not torch.equal(leaky[0][:, 8:], leaky[1][:, 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_positions_is_found_to_keep_documents_apart(dtype: torch.dtype) -> None:
    model = small_llama().to(dtype)
    model.train()
    assert isolates(model)
    assert model.training


def test_a_model_without_positions_is_found_to_mix_documents() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    assert not isolates(BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)))


def test_a_recurrent_model_is_found_to_mix_documents() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    assert not isolates(MambaForCausalLM(config))

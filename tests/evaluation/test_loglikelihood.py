"""Log-likelihoods against a reference that knows no batches, and the rules for tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_recovery import chat_tokenizer, small_llama
from helpers_run import tiny_llama
from helpers_tasks import records, trained_tokenizer

from pyprune.chat.speaker import Speaker
from pyprune.errors import PyPruneError
from pyprune.evaluation import generation
from pyprune.evaluation import logits as logits_module
from pyprune.evaluation.loglikelihood import Request, encode_pairs, loglikelihoods, max_positions
from pyprune.importance.sources import encode
from pyprune.recovery.examples import Encoder


def model_and_tokenizer(bos: bool = False):
    return tiny_llama(vocab_size=400, bos_token_id=0, eos_token_id=1), trained_tokenizer(bos)


def pairs() -> list[tuple[str, str]]:
    return [(r["context"], " " + c) for r in records(20) for c in r["choices"]]


@torch.no_grad()
def reference(model, request: Request) -> tuple[float, bool]:
    """Token by token, one sequence at a time, float64."""
    ids = [*request.inputs, request.continuation[-1]]
    out = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for t in range(len(ids) - len(request.continuation), len(ids)):
        total += out[t - 1, ids[t]].item()
        greedy = greedy and int(out[t - 1].argmax()) == ids[t]
    return total, greedy


HALVES = "a\ud800b \udc00, a pair \ud83d\ude00"  # of surrogate pairs: no encoding of text has them
WHOLE = "a\ufffdb \ufffd, a pair \U0001f600"
READERS = {
    "calibration and evaluation": lambda tokenizer, text: encode(tokenizer, text, "x.jsonl").tolist(),
    "training": lambda tokenizer, text: Encoder(tokenizer)({"prompt": text, "completion": text}, "here").ids.tolist(),
    "tasks": lambda tokenizer, text: encode_pairs(tokenizer, [(text, text), ("", text)], 256),
    "samples": lambda tokenizer, text: generation.continuation(tiny_llama(vocab_size=400), tokenizer, text, 3),
    "chat": lambda tokenizer, text: Speaker(tiny_llama(), tokenizer, "x")._ids(
        [{"role": "user", "content": text}], text
    ).tolist(),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_half_a_surrogate_pair_is_read_as_a_replacement_character(name: str) -> None:
    tokenizer = trained_tokenizer()
    assert READERS[name](tokenizer, HALVES) == READERS[name](tokenizer, WHOLE)


def test_half_a_surrogate_pair_goes_through_a_chat_template_too() -> None:
    speaker = Speaker(small_llama(), chat_tokenizer(), "x")
    assert speaker._ids([], HALVES).tolist() == speaker._ids([], WHOLE).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_matches_the_definition_in_any_batch(batch_size: int) -> None:
    model, tokenizer = model_and_tokenizer()
    found = loglikelihoods(model, tokenizer, pairs(), batch_size=batch_size)
    wanted = [reference(model, r) for r in encode_pairs(tokenizer, pairs(), 256)]
    assert [f.total for f in found] == pytest.approx([w[0] for w in wanted], rel=1e-5)
    assert [f.greedy for f in found] == [w[1] for w in wanted]


def test_the_likeliest_continuation_is_greedy_and_its_neighbour_is_not() -> None:
    model, tokenizer = model_and_tokenizer()
    prompt = tokenizer.encode("for statement in")
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())

    class Fixed(type(tokenizer)):
        def encode(self, text, **kwargs):
            return {"x": prompt, "x y": [*prompt, best], "x z": [*prompt, (best + 1) % 400]}[text]

    tokenizer.__class__ = Fixed
    assert [f.greedy for f in loglikelihoods(model, tokenizer, [("x", " y"), ("x", " z")])] == [True, False]


def test_logits_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    whole = loglikelihoods(model, tokenizer, pairs(), batch_size=4)
    monkeypatch.setattr(logits_module, "PIECE_BYTES", 4 * 400 * 4 * 3)  # three positions of four rows at a time
    parts = loglikelihoods(model, tokenizer, pairs(), batch_size=4)
    assert [p.total for p in parts] == pytest.approx([w.total for w in whole], rel=1e-5)
    assert [p.greedy for p in parts] == [w.greedy for w in whole]


def test_tokens_join_as_in_the_whole_text_and_spaces_move_to_the_continuation() -> None:
    tokenizer = trained_tokenizer()
    whole = tokenizer.encode("the statement of the object")
    for context, continuation in (("the statement", " of the object"), ("the statement  ", "of the object")):
        (request,) = encode_pairs(tokenizer, [(context, continuation)], 256)
        text = tokenizer.decode([*request.inputs, request.continuation[-1]])
        assert text == context + continuation
        assert len(request.continuation) + len(tokenizer.encode("the statement")) == len(tokenizer.encode(text))
    (request,) = encode_pairs(tokenizer, [("the statement", " of the object")], 256)
    assert [*request.inputs, request.continuation[-1]] == whole


def test_special_tokens_are_the_tokenizers_own_and_not_doubled() -> None:
    plain, bos = trained_tokenizer(), trained_tokenizer(bos=True)
    for tokenizer, context, wanted in ((plain, "Q:", None), (bos, "Q:", 0), (bos, "<s>Q:", 0)):
        (request,) = encode_pairs(tokenizer, [(context, " a")], 256)
        assert (request.inputs[0] == 0) is (wanted == 0)
        assert request.inputs.count(0) == (wanted == 0)


def test_an_empty_context_becomes_the_bos_token() -> None:
    tokenizer = trained_tokenizer()
    (request,) = encode_pairs(tokenizer, [("", " no")], 256)
    assert request.inputs[0] == tokenizer.bos_token_id
    assert list(request.continuation) == tokenizer.encode(" no")
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(PyPruneError, match="a context is empty, and the tokenizer has neither BOS nor EOS"):
        encode_pairs(tokenizer, [("", " no")], 256)


def test_a_context_too_long_loses_tokens_on_the_left() -> None:
    tokenizer = trained_tokenizer()
    context = "a b c d e f g h i j k l m n o p"
    (request,) = encode_pairs(tokenizer, [(context, " no")], 6)
    whole = tokenizer.encode(context + " no")
    assert list(request.inputs) == whole[-7:-1]
    with pytest.raises(PyPruneError, match=r"is a choice of \d+ tokens, and the model knows 3 positions"):
        encode_pairs(tokenizer, [("Q:", " " + context)], 3)


def test_choices_that_differ_in_their_last_token_cost_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    tokenizer.add_tokens(["@no", "@yes"])  # one token each
    model.resize_token_embeddings(402)
    rows = []
    decoder = model.get_decoder()
    original = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda *a, **k: rows.append(k["input_ids"].shape) or original(*a, **k), raising=False
    )
    monkeypatch.setattr("pyprune.evaluation.loglikelihood.can_split", lambda *_: False)
    found = loglikelihoods(model, tokenizer, [("Is it?", "@no"), ("Is it?", "@yes"), ("Is it?", "@no")])
    assert [shape[0] for shape in rows] == [1]
    assert found[0] == found[2] != found[1]


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer = model_and_tokenizer()
    loglikelihoods(model.train(), tokenizer, pairs()[:4])
    assert model.training and all(p.grad is None for p in model.parameters())


def test_positions_come_from_the_model_then_the_tokenizer() -> None:
    model, tokenizer = model_and_tokenizer()
    assert max_positions(model, tokenizer) == 256
    unlimited = SimpleNamespace(config=SimpleNamespace(text_config=None))
    assert max_positions(unlimited, tokenizer) == 2048  # the tokenizer states no limit
    tokenizer.model_max_length = 77
    assert max_positions(unlimited, tokenizer) == 77
    inner = SimpleNamespace(config=SimpleNamespace(n_positions=5, text_config=SimpleNamespace(n_ctx=9)))
    assert max_positions(inner, tokenizer) == 9


def test_log_likelihoods_that_are_no_numbers_are_an_error() -> None:
    model, tokenizer = model_and_tokenizer()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(PyPruneError, match="dtype 'float32': log-likelihoods are not numbers"):
        loglikelihoods(model, tokenizer, pairs()[:4])

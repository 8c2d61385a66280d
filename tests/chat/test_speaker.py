"""Answers: what they say, how fast, and what is remembered."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from pyprune.chat.speaker import Conversation, Sampling, Speaker
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import continuation
from pyprune.parsing import MAX_SEED

SHORT = Sampling(max_new_tokens=12)


def complete(talk: Conversation, prompt: str):
    *_, answers = talk.ask(prompt)
    return answers


def test_a_greedy_answer_without_chat_template_is_the_greedy_continuation(speaker) -> None:
    one = speaker("plain")
    answer = complete(Conversation([one], SHORT), "The red house")[0]
    assert answer.text == continuation(one.model, one.tokenizer, "The red house", 12)
    assert answer.prompt_tokens == len("The red house")


def test_with_a_chat_template_the_model_reads_the_conversation_under_it(speaker) -> None:
    one = speaker("dense")
    talk = Conversation([one], SHORT)
    first = complete(talk, "Hello")[0]
    second = complete(talk, "And you?")[0]
    asked = one.tokenizer.apply_chat_template(talk.histories[0][:3], add_generation_prompt=True, tokenize=False)
    assert second.text == continuation(one.model, one.tokenizer, asked, 12)
    assert [m["content"] for m in talk.histories[0]] == ["Hello", first.text, "And you?", second.text]


def test_each_model_has_its_own_history_and_one_answers_after_the_other(speaker) -> None:
    talk = Conversation([speaker("dense"), speaker("other")], SHORT)
    seen = [[a.tokens for a in answers] for answers in talk.ask("Hello")]
    assert seen[11] == [12] and seen[12] == [12, 1] and seen[-1] == [12, 12]
    answers = [h[1]["content"] for h in talk.histories]
    assert answers[0] != answers[1]
    alone = Conversation([speaker("other")], SHORT)
    assert complete(alone, "Hello")[0].text == answers[1]
    talk.reset()
    assert talk.histories == [[], []]


def test_text_grows_and_the_clock_runs(speaker, monkeypatch) -> None:
    one = speaker("plain")
    real, clock = one.model.forward, SimpleNamespace(now=40.0)

    def slow(*args, **more):
        clock.now += 0.25
        return real(*args, **more)

    monkeypatch.setattr("pyprune.chat.speaker.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(one.model, "forward", slow)
    seen = [(a.tokens, a.first_token) for a in one.stream([], "The", Sampling(6))]
    assert [n for n, _ in seen] == list(range(1, 7))
    last = list(one.stream([], "The", Sampling(6)))[-1]
    assert last.first_token == 0.25 and last.rate == 4 and last.ended in ("end", "length")


def test_temperature_draws_by_the_seed(speaker) -> None:
    one = speaker("plain")

    def drawn(seed: int) -> str:
        return complete(Conversation([one], Sampling(16, 1.5, seed)), "The")[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert drawn(MAX_SEED)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(60, 200))},
        {"min_new_tokens": 12, "max_length": 5},
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.05, "top_k": 3, "temperature": 0.1},
    ],
    ids=lambda own: next(iter(own)),
)
def test_generation_settings_of_the_checkpoint_change_no_answer_and_stay(speaker, own) -> None:
    one, model = speaker("plain"), None
    said = []
    for settings in ({}, own):
        model = one.model
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        kept = model.generation_config
        texts = [complete(Conversation([one], Sampling(12, t)), "red green")[0].text for t in (0.0, 0.8)]
        said.append([*texts, continuation(model, one.tokenizer, "red green", 12)])
        assert model.generation_config is kept and kept.to_dict().items() >= settings.items()
    assert said[0] == said[1]


def test_leaving_an_answer_early_gives_the_model_its_own_settings_back(speaker) -> None:
    one = speaker("plain")
    kept = one.model.generation_config
    growing = one.stream([], "The", Sampling(200))
    next(growing)
    growing.close()
    assert one.model.generation_config is kept


def test_an_answer_ends_at_the_models_own_end_mark(speaker) -> None:
    one = speaker("plain")
    mark = one.tokenizer.eos_token_id
    with torch.no_grad():  # whatever it reads, the end mark is what it says
        one.model.model.norm.weight.zero_()
        one.model.lm_head = torch.nn.Linear(32, one.model.config.vocab_size)
        one.model.lm_head.bias.zero_()[mark] = 9.0
    answer = complete(Conversation([one], SHORT), "The")[0]
    assert (answer.tokens, answer.text, answer.ended, answer.rate) == (1, "", "end", None)


def test_leaving_early_stops_the_model_and_keeps_what_was_said(speaker) -> None:
    talk = Conversation([speaker("plain")], Sampling(200))
    before = set(threading.enumerate())
    growing = talk.ask("The")
    for answers in growing:
        if answers[0].tokens == 3:
            break
    growing.close()
    assert set(threading.enumerate()) <= before  # others may have ended meanwhile
    assert answers[0].ended == "stopped"
    assert talk.histories[0][1]["content"] == answers[0].text


def test_the_oldest_messages_go_when_the_positions_are_used_up(speaker) -> None:
    talk = Conversation([speaker("dense")], Sampling(40))
    answers = [complete(talk, "word " * 12)[0] for _ in range(4)]
    assert [a.forgotten for a in answers] == sorted(a.forgotten for a in answers)
    assert answers[0].forgotten == 0 and answers[-1].forgotten >= 2
    assert all(a.prompt_tokens + a.tokens <= 256 for a in answers)
    assert len(talk.histories[0]) == 8


def test_a_prompt_that_fills_the_positions_leaves_room_for_what_fits(speaker) -> None:
    answer = complete(Conversation([speaker("plain")], Sampling(100)), "x" * 250)[0]
    assert answer.tokens <= 6


def test_a_prompt_longer_than_the_positions_is_refused_and_not_remembered(speaker) -> None:
    talk = Conversation([speaker("plain")], SHORT)
    with pytest.raises(PyPruneError, match="has 300 tokens, and the model knows 256 positions"):
        complete(talk, "x" * 300)
    assert talk.histories == [[]]


def test_an_error_in_the_model_reaches_the_caller(speaker, monkeypatch) -> None:
    one = speaker("plain")

    def broken(*args, **more):
        raise RuntimeError("no memory")

    monkeypatch.setattr(one.model, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(one.stream([], "The", SHORT))


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(speaker) -> None:
    one = speaker("plain")
    ids = one.tokenizer("Grün: 木")["input_ids"]
    said = iter(ids)

    class Reciting(torch.nn.Module):
        """Says the same text whatever it reads."""

        def forward(self, hidden):
            out = torch.zeros(*hidden.shape[:-1], one.model.config.vocab_size)
            out[:, -1, next(said)] = 1.0
            return out

    one.model.lm_head = Reciting()
    texts = [a.text for a in one.stream([], "x", Sampling(len(ids)))]
    assert texts[-1] == "Grün: 木" and not any("\ufffd" in t for t in texts)


def test_a_pruned_folder_with_widths_of_its_own_in_every_layer_talks(speaker, place) -> None:
    import pyprune

    pyprune.prune("dense", widths={"ffn": 0.5}, layers=[0], criterion="l2", output_dir="hetero")
    one = speaker("hetero")
    assert isinstance(one, Speaker) and one.chats
    assert len({layer.mlp.gate_proj.out_features for layer in one.model.model.layers}) > 1
    assert complete(Conversation([one], SHORT), "Hello")[0].tokens > 0


def test_a_model_without_tokenizer_is_refused(speaker, place) -> None:
    for file in (place / "dense").glob("*token*"):
        file.unlink()
    with pytest.raises(PyPruneError, match="compare 'dense': has no tokenizer to read prompts with"):
        speaker("dense", option="compare")


def test_positions_count_by_whatever_name(speaker) -> None:
    import transformers as t

    history = [{"role": "user", "content": "word " * 12}, {"role": "assistant", "content": "word"}]
    one = speaker("dense")
    whole, forgotten, _ = one._fit(history, "word", 8)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 97, "max_seq_len": whole.shape[1]}
    short = Speaker(t.MptForCausalLM(t.MptConfig(**sizes)), one.tokenizer, "short")
    ids, left_out, room = short._fit(history, "word", 8)
    assert (forgotten, left_out) == (0, 2) and ids.shape[1] + room <= whole.shape[1]

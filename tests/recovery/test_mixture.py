"""The training text: proportions, order, what is held out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers_recovery import sentences
from helpers_run import byte_tokenizer

from pyprune.errors import PyPruneError
from pyprune.recovery.examples import Encoder
from pyprune.recovery.mixture import Reading, Text, read_text

ENCODER = Encoder(byte_tokenizer())
READING = Reading(cutoff=64, packing=True, seed=0)


def text_of(*sources, val_tokens: int = 300, validation=None, **changes) -> Text:
    reading = Reading(**{**vars(READING), **changes})
    return read_text(sources, validation, ENCODER, reading, val_tokens)


def documents(rows) -> list[str]:
    """The documents of rows, as text."""
    out = []
    for row in rows:
        starts = [*np.flatnonzero(row.positions == 0), len(row.ids)]
        out += [ENCODER.tokenizer.decode(row.ids[a:b].tolist()) for a, b in pairwise(starts)]
    return out


def marked(count: int, mark: str) -> list[dict[str, str]]:
    return [{"text": f"{mark} {i} {r['text']}"[:60]} for i, r in enumerate(sentences(count))]


def test_what_is_held_out_is_never_trained_on_and_nothing_else_is_lost() -> None:
    records = marked(80, "a")
    text = text_of((records, None))
    trained, held = set(documents(text.order(2, 0))), set(documents(text.validation))
    assert held and not trained & held
    assert trained | held == {r["text"] + "</s>" for r in records}
    assert sum(len(r.ids) for r in text.validation) <= 300


def test_at_most_a_tenth_is_held_out() -> None:
    text = text_of((marked(80, "a"), None), val_tokens=10**6)
    held, all_of_it = (sum(len(r.ids) for r in rows) for rows in (text.validation, text.validation + text.sources[0]))
    assert 0.05 < held / all_of_it <= 0.1


def test_a_text_file_is_held_out_by_pieces(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("".join(chr(97 + i % 26) for i in range(6400)))
    text = text_of((str(tmp_path / "t.txt"), None))
    assert len(text.validation) == 4 and len(text.sources[0]) == 100 - 4


def test_validation_text_of_its_own_leaves_the_data_whole() -> None:
    text = text_of((marked(30, "a"), None), validation=((marked(5, "v"), None),))
    assert all(d.startswith("v") for d in documents(text.validation))
    assert len(documents(text.sources[0])) == 30


@pytest.mark.parametrize("val_tokens", [2000, 10**6])
@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 3.0)])
def test_weights_of_validation_text_are_proportions_of_its_tokens(weights, val_tokens) -> None:
    sources = [(marked(100, "a"), weights[0]), (marked(100, "bb"), weights[1])]
    rows = text_of((marked(30, "c"), None), validation=sources, val_tokens=val_tokens).validation
    held = documents(rows)
    tokens = [sum(len(d) for d in held if d.startswith(m + " ")) for m in ("a", "bb")]
    assert tokens[0] / tokens[1] == pytest.approx(weights[0] / weights[1], rel=0.15)
    assert sum(len(r.ids) for r in rows) <= val_tokens
    if val_tokens == 10**6:  # until one of them is used up
        assert 100 in [sum(d.startswith(m + " ") for d in held) for m in ("a", "bb")]


def test_validation_sources_without_weights_are_read_alike() -> None:
    sources = [(marked(100, "a"), None), (marked(10, "bb"), None)]
    for val_tokens in (800, 10**6):
        held = documents(text_of((marked(30, "c"), None), validation=sources, val_tokens=val_tokens).validation)
        counts = [sum(d.startswith(m + " ") for d in held) for m in ("a", "bb")]
        assert counts == [100, 10] if val_tokens == 10**6 else abs(counts[0] - counts[1]) <= 2


def test_weights_are_proportions_of_tokens() -> None:
    text = text_of((marked(400, "a"), 3.0), (marked(100, "bb"), 1.0))
    order = documents(text.order(1, 0))
    tokens = {m: sum(len(d) for d in order if d.startswith(m + " ")) for m in ("a", "bb")}
    assert tokens["a"] / tokens["bb"] == pytest.approx(3, rel=0.15)
    assert len(order) == len(set(order))  # nothing twice in one epoch


def test_a_second_epoch_takes_rows_of_the_larger_source_that_the_first_left() -> None:
    text = text_of((marked(300, "a"), 1.0), (marked(100, "bb"), 1.0))
    once, twice = documents(text.order(1, 0)), documents(text.order(2, 0))
    a = {d for d in once if d.startswith("a ")}
    later = [d for d in twice[len(once) :] if d.startswith("a ")]
    assert len(set(later) - a) > 0.9 * len(later)


def test_without_weights_an_epoch_is_everything_once_and_epochs_differ_in_order() -> None:
    text = text_of((marked(50, "a"), None), (marked(20, "bb"), None))
    order = text.order(2, 0)
    count = sum(map(len, text.sources))
    assert len(order) == 2 * count
    first, second = order[:count], order[count:]
    assert {id(r) for r in first} == {id(r) for r in second} and first != second
    assert [id(r) for r in text.order(2, 0)] == [id(r) for r in order]
    assert [id(r) for r in text.order(2, 1)] != [id(r) for r in order]


def test_half_an_epoch_is_half_of_the_rows() -> None:
    text = text_of((marked(60, "a"), None))
    assert len(text.order(0.5, 0)) == round(len(text.sources[0]) / 2)


def test_reading_stops_at_the_most_tokens_asked_for() -> None:
    text = text_of((marked(500, "a"), None), max_tokens=1000)
    assert 1000 <= text.facts[0]["tokens"] < 1100


def test_of_a_long_text_no_more_is_read_than_asked_for(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh" * 1000)
    text = text_of((str(tmp_path / "t.txt"), None), max_tokens=1000)
    assert text.facts[0]["tokens"] == 1024  # whole rows of 64


def test_the_fingerprint_changes_with_text_and_seed_and_with_nothing_else() -> None:
    base = text_of((marked(40, "a"), None)).fingerprint()
    assert text_of((marked(40, "a"), None)).fingerprint() == base
    assert text_of((marked(40, "c"), None)).fingerprint() != base
    assert text_of((marked(40, "a"), None), seed=1).fingerprint() != base


def test_too_little_to_train_and_hold_out_is_refused() -> None:
    with pytest.raises(PyPruneError, match=r"data 'records': has too little text.*Give more of it, or give val_data"):
        text_of(([{"text": "only one"}], None))


def test_answers_that_never_fit_are_refused_with_the_way_out() -> None:
    record = {"prompt": "p" * 80, "completion": "never reached"}
    with pytest.raises(PyPruneError, match=r"has nothing to learn in its 3 records, at 64 tokens each. Raise cutoff"):
        text_of(([record] * 3, None))


def test_the_report_says_how_many_records_taught_nothing() -> None:
    records = [*marked(30, "a"), {"prompt": "p" * 80, "completion": "x"}]
    assert text_of((records, None)).facts[0]["nothing_to_learn"] == 1

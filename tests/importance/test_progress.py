"""Progress: bars on a terminal, now and then a line elsewhere, only when wanted, and never in the way of the work."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from helpers_llama import llama_groups, tiny_llama

from pyprune import progress
from pyprune.importance import score


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest puts its own in sys
    return stream


def test_a_terminal_shows_the_label_the_count_and_the_time_left(terminal: Terminal) -> None:
    assert list(progress.track([1, 2, 3], "reading")) == [1, 2, 3]
    shown = terminal.getvalue()
    assert "reading" in shown and "/3" in shown and "left" in shown


def test_short_work_writes_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown(True):
        assert list(progress.track(iter("ab"), "reading")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that pass only when a test says so."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_long_work_writes_a_line_a_minute_where_there_is_no_terminal(clock, capsys) -> None:
    for i in progress.track(range(200), "measuring"):
        clock.now += 30.0 if i < 6 else 3600.0 if i == 6 else 0.0
    out, lines = capsys.readouterr()
    assert out == ""
    assert lines.splitlines() == [
        "measuring: 2 of 200, 1 h 39 min left (1 min so far)",
        "measuring: 4 of 200, 1 h 38 min left (2 min so far)",
        "measuring: 6 of 200, 1 h 37 min left (3 min so far)",
        "measuring: 7 of 200, 28 h 57 min left (1 h 3 min so far)",
    ]


def test_a_line_carries_the_last_label_and_no_end_where_none_is_known(clock, capsys) -> None:
    with progress.bar("reading") as bar:
        bar.say("reading more")
        clock.now = 61.0
        bar.advance(5)
    assert capsys.readouterr().err == "reading more: 5 (1 min so far)\n"


def test_no_line_is_written_where_none_is_wanted(clock, capsys) -> None:
    with progress.shown(False):
        for _ in progress.track(range(3), "reading"):
            clock.now += 100.0
    assert capsys.readouterr() == ("", "")


def test_silence_holds_inside_and_ends_outside(terminal: Terminal) -> None:
    with progress.shown(False), progress.shown(True):
        list(progress.track([1], "quiet"))
        assert not progress.visible()
    assert terminal.getvalue() == "" and progress.visible()


def test_bars_may_be_nested_and_an_error_leaves_no_display_behind(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError), progress.bar("outer", 2) as outer, progress.bar("inner", 2):
        outer.advance()
        1 / 0  # noqa: B018
    assert not progress._live
    list(progress.track([1], "again"))
    assert "again" in terminal.getvalue()


@pytest.mark.parametrize("wanted", [None, False])
def test_scoring_shows_a_bar_unless_told_not_to(terminal: Terminal, wanted: bool | None) -> None:
    model = tiny_llama()
    score(model, llama_groups(model.config, model), torch.randint(0, 97, (2, 6)), progress=wanted)
    assert ("scoring" in terminal.getvalue()) == (wanted is None)

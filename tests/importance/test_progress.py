"""Progress bars: on a terminal only, only when wanted, and never in the way of the work."""

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


def test_nothing_is_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown(True):
        assert list(progress.track(iter("ab"), "reading")) == ["a", "b"]
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

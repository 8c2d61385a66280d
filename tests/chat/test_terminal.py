"""``pyprune chat`` in the terminal: one answer or two, a loop or a single prompt."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from helpers_fresh import pyprune_fresh
from helpers_run import ROOT
from rich.console import Console

from pyprune.chat import terminal
from pyprune.chat.speaker import Conversation, Sampling

SHORT = ("--max_new_tokens", "8")


def console(terminal_like: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, height=30, force_terminal=terminal_like, color_system=None)


def test_one_prompt_is_answered_with_its_speed(call, place) -> None:
    ended = call("chat", "dense", "--prompt", "Hello", *SHORT)
    assert ended.status == 0 and ended.err == ""
    assert "8 tokens, " in ended.out and "tokens/s, first after " in ended.out


def test_two_models_stand_side_by_side_the_dense_one_on_the_left(call, place) -> None:
    ended = call("chat", "--compare", "dense", "other", "--prompt", "Hello", *SHORT)
    assert ended.status == 0, ended.err
    title = ended.out.splitlines()[0]
    assert 0 < title.index("dense") < title.index("other")
    assert ended.out.count("tokens/s") == 2


def test_json_holds_both_answers_and_their_figures(call, place) -> None:
    data = json.loads(call("chat", "other", "--compare", "dense", "--prompt", "Hello", *SHORT, "--json").out)
    assert [a["model"] for a in data["answers"]] == ["dense", "other"]
    for answer in data["answers"]:
        assert (
            answer["tokens"] == 8 and answer["first_token"] > 0 and answer["rate"] > 0 and answer["ended"] == "length"
        )


def test_prompts_come_through_a_pipe_a_line_each(place) -> None:
    ended = pyprune_fresh("chat", "dense", *SHORT, cwd=place, text="Hello\n\nAnd you?\n/quit\nnever\n")
    assert ended.status == 0, ended.err
    assert ended.out.count("tokens/s") == 2 and ended.err == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_at_a_keyboard_it_asks_answers_and_ends_with_control_d(place) -> None:
    import os
    import pty
    import select

    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyprune", "chat", "--compare", "dense", "other", *SHORT],
        cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(mark: bytes, count: int = 1) -> None:
        nonlocal seen
        while seen.count(mark) < count:
            assert select.select([ours], [], [], 120)[0], seen
            seen += os.read(ours, 4096)

    try:
        until(b"> ")
        assert b"dense: " in seen and b"parameters" in seen and b"/reset" in seen
        os.write(ours, b"Hello\n")
        until(b"> ", 2)
        assert seen.count(b"tokens/s, first after") >= 2
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_prompt_given_as_an_option_leaves_the_pipe_alone(call, place, monkeypatch) -> None:
    class Untouched:
        def isatty(self) -> bool:
            return False

        def __iter__(self):
            raise AssertionError("standard input was read")

    monkeypatch.setattr(sys, "stdin", Untouched())
    assert call("chat", "dense", "--prompt", "Hello", *SHORT).status == 0


def test_the_loop_keeps_history_until_reset_and_ends_at_quit(speaker) -> None:
    talk, out = Conversation([speaker("dense")], Sampling(4)), console()
    sizes = []

    def lines():
        for line in ("One", "Two", "/help", "/reset", "Three", "/quit", "Four"):
            sizes.append(len(talk.histories[0]))
            yield line

    terminal.converse(talk, out, lines())
    assert sizes == [0, 2, 4, 4, 0, 2]
    printed = out.file.getvalue()
    assert "The conversation begins anew." in printed and "/reset: forget the conversation" in printed


def test_a_mistake_is_told_and_the_loop_goes_on(speaker) -> None:
    talk, out = Conversation([speaker("plain")], Sampling(4)), console()
    terminal.converse(talk, out, ["x" * 300, "/rest", "Hello"])
    printed = out.file.getvalue()
    assert "has 300 tokens, and the model knows 256" in printed and "/rest is no command." in printed
    assert printed.count("first after") == 1


def test_a_prompt_may_begin_with_a_slash(speaker) -> None:
    talk = Conversation([speaker("plain")], Sampling(4))
    terminal.converse(talk, console(), ["/etc is a folder"])
    assert talk.histories[0][0]["content"] == "/etc is a folder"


def test_control_c_stops_an_answer_and_not_the_loop(speaker, monkeypatch) -> None:
    talk, out = Conversation([speaker("plain")], Sampling(50)), console(True)
    real = Conversation.ask

    def interrupted(self, prompt):
        for number, answers in enumerate(real(self, prompt)):
            yield answers
            if prompt == "first" and number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    terminal.converse(talk, out, ["first", "second"])
    assert "stopped" in out.file.getvalue()
    assert [m["content"] for m in talk.histories[0] if m["role"] == "user"] == ["first", "second"]


def test_in_a_terminal_one_answer_flows_and_is_written_once(speaker) -> None:
    talk, out = Conversation([speaker("dense")], Sampling(20)), console(True)
    answer = terminal.show(talk, out, "Hello")[0]
    assert out.file.getvalue().startswith(answer.text + "\n")
    assert terminal.timing(answer) in out.file.getvalue()


def test_in_a_terminal_two_answers_end_as_two_whole_columns(speaker) -> None:
    talk, out = Conversation([speaker("dense"), speaker("other")], Sampling(20)), console(True)
    answers = terminal.show(talk, out, "Hello")
    final = out.file.getvalue().split("\x1b[2K")[-1]
    for answer in answers:
        assert terminal.timing(answer) in final


def test_a_growing_column_shows_its_end_where_it_is_higher_than_the_terminal() -> None:
    from pyprune.chat.speaker import Answer

    out = console(True)
    text = "\n".join(f"line {n}" for n in range(100))
    out.print(terminal._columns([Answer("dense", text)], 2, out))
    shown = out.file.getvalue()
    assert "line 99" in shown and "line 5 " not in shown and "waits" in shown
    assert len(shown.splitlines()) <= 30


def test_markup_in_an_answer_is_text(speaker) -> None:
    from pyprune.chat.speaker import Answer

    out = console()
    out.print(terminal._whole([Answer("a", "[bold]x[/bold]"), Answer("[red]b", "y")], 2))
    assert "[bold]x[/bold]" in out.file.getvalue() and "[red]b" in out.file.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("nowhere/at/all",), "MODEL 'nowhere/at/all': does not exist"),
        (("dense", "--compare", "./nowhere"), "--compare './nowhere': does not exist"),
        (("dense", "--temperature", "-1", "--prompt", "x"), "--temperature -1.0: must be a number, at least 0."),
        (("dense", "--temperature", "nan", "--prompt", "x"), "--temperature nan: must be a number, at least 0."),
        (("dense", "--prompt", " "), "--prompt ' ': is empty."),
        (("dense", "--json"), "--json: is for the answers to one prompt. Give prompt too."),
        (("dense", "--web", "--prompt", "x"), "--web: opens a page, where prompts are typed."),
        (("dense", "--device", "gpu", "--prompt", "x"), "--device 'gpu': must be auto, cpu, cuda or cuda:N."),
        (("dense", "--max_new_tokens", "0", "--prompt", "x"), "0 is not in the range x>=1"),
        (("dense", "--seed", str(2**63), "--prompt", "x"), "is not in the range 0<=x<="),
    ],
)
def test_mistakes_end_in_one_line(call, place, options: tuple[str, ...], said: str) -> None:
    ended = call("chat", *options)
    assert ended.status == 2 and ended.out == ""
    assert said in ended.err and ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_the_page_without_gradio_names_the_extra(call, place, monkeypatch) -> None:
    from pyprune.chat import page

    monkeypatch.setattr(page, "find_spec", lambda name: None)
    ended = call("chat", "dense", "--web")
    assert ended.status == 2
    assert ended.err == "error: --web: needs the package gradio. Install it: pip install 'pyprune[web]'.\n"

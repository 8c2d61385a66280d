"""The conversation in a terminal: a prompt loop, answers as they come, two of them side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyprune.chat.speaker import Answer, Conversation
from pyprune.errors import PyPruneError

COMMANDS = {"/reset": "forget the conversation", "/quit": "end (also Ctrl-D)", "/help": "this list"}
_FRAME = 6  # lines of a terminal that are not text: borders, timing, prompt


def converse(talk: Conversation, console: Console, lines: Iterable[str]) -> None:
    """Answer line after line until they end, or until ``/quit``. Mistakes in a line are told, and the next one comes.

    Ctrl-C stops an answer; what was said by then counts.
    """
    for line in lines:
        prompt = line.strip()
        if not prompt:
            continue
        if prompt in ("/quit", "/exit"):
            return
        if prompt == "/reset":
            talk.reset()
            console.print(Text("The conversation begins anew.", style="dim"))
        elif prompt.startswith("/") and " " not in prompt:
            told = "" if prompt == "/help" else f"{prompt} is no command. "
            console.print(Text(told + ", ".join(f"{k}: {v}" for k, v in COMMANDS.items()), style="dim"))
        else:
            try:
                show(talk, console, prompt)
            except PyPruneError as error:
                console.print(Text(f"error: {error}"))
            except KeyboardInterrupt:
                console.print(Text("stopped", style="dim"))


def show(talk: Conversation, console: Console, prompt: str) -> list[Answer]:
    """Ask, and print the answers: as they come where the console is a terminal, else when they are complete."""
    if not console.is_terminal:
        answers = last(talk, prompt)
        console.print(_whole(answers, len(talk.speakers)))
        return answers
    if len(talk.speakers) == 1:
        return _flow(talk, console, prompt)
    answers = []
    try:
        with (
            closing(talk.ask(prompt)) as growing,
            Live(console=console, transient=True, refresh_per_second=8) as live,
        ):
            for answers in growing:
                live.update(_columns(answers, len(talk.speakers), console))
    finally:
        if answers:
            console.print(_whole(answers, len(talk.speakers)))
    return answers


def last(talk: Conversation, prompt: str) -> list[Answer]:
    """The complete answers."""
    answers: list[Answer] = []
    with closing(talk.ask(prompt)) as growing:
        for so_far in growing:
            answers = so_far
    return answers


def typed(console: Console) -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return


def piped() -> Iterator[str]:
    """Lines from a pipe or file."""
    yield from sys.stdin


def greeting(talk: Conversation) -> list[RenderableType]:
    """Who is there, and how to leave."""
    out: list[RenderableType] = []
    for speaker in talk.speakers:
        size = sum(p.numel() for p in speaker.model.parameters())
        plain = "" if speaker.chats else "; no chat template, so it continues the text"
        out.append(Text(f"{speaker.name}: {size:,} parameters{plain}"))
    out.append(Text(", ".join(f"{k}: {v}" for k, v in COMMANDS.items()), style="dim"))
    return out


def timing(answer: Answer) -> str:
    """``12 tokens, 34.5 tokens/s, first after 0.12 s``."""
    if answer.first_token is None:
        return ""
    parts = [f"{answer.tokens} token{'s' * (answer.tokens != 1)}"]
    if answer.rate is not None:
        parts.append(f"{answer.rate:.{1 if answer.rate < 100 else 0}f} tokens/s")
    parts.append(f"first after {answer.first_token:.2f} s")
    if answer.forgotten:
        parts.append(f"{answer.forgotten} messages did not fit")
    return ", ".join(parts)


def _flow(talk: Conversation, console: Console, prompt: str) -> list[Answer]:
    """One answer, written on as it comes."""
    answers: list[Answer] = []
    written = ""
    try:
        with closing(talk.ask(prompt)) as growing:
            for answers in growing:
                text = answers[0].text
                if text.startswith(written):
                    console.print(Text(text[len(written) :]), end="", soft_wrap=True)
                    written = text
    finally:
        if answers:
            text = answers[0].text
            rest = text[len(written) :] if text.startswith(written) else f"\n{text}"  # the tokenizer thought again
            console.print(Text(rest), soft_wrap=True)
            console.print(Text(timing(answers[0]), style="dim"))
    return answers


def _whole(answers: Sequence[Answer], speakers: int) -> RenderableType:
    if speakers == 1:
        return Group(Text(answers[0].text), Text(timing(answers[0]), style="dim"))
    return _columns(answers, speakers)


def _columns(answers: Sequence[Answer], speakers: int, console: Console | None = None) -> Table:
    """Answers beside each other; with a console only as much of their ends as it holds at once."""
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    cells: list[RenderableType] = []
    for number in range(speakers):
        table.add_column(ratio=1)
        if number >= len(answers):
            cells.append(Panel(Text("waits", style="dim")))
            continue
        answer = answers[number]
        text = Text(answer.text, overflow="fold")
        if console is not None:
            lines = text.wrap(console, max(8, console.width // speakers - 6))
            text = Text("\n").join(lines[-max(1, console.height - _FRAME) :])
        body = Group(text, Text(timing(answer), style="dim"))
        cells.append(Panel(body, title=Text(answer.model), title_align="left"))
    table.add_row(*cells)
    return table

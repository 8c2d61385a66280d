"""``pyprune chat``: talk to a model, or to two side by side."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from pyprune.cli.options import add_verb, common
from pyprune.cli.output import emit, reporting
from pyprune.errors import PyPruneError
from pyprune.parsing import DTYPES, MAX_SEED

HELP = """Talk to MODEL, or to two models side by side.

With --compare both get the same prompts and keep a history of their own; one answers after the other, so that the
tokens a second and the seconds to the first token under each answer are those of a machine to itself.

Tokenizers with a chat template make it a conversation; without one the model continues the text. /reset begins anew,
/quit or Ctrl-D ends, Ctrl-C stops an answer. Prompts may also come through a pipe, one a line.
"""

EXAMPLES = """
Examples:
  pyprune chat smaller
  pyprune chat --compare DENSE smaller
  pyprune chat --compare DENSE smaller --prompt "Why is the sky blue?" --max_new_tokens 64
  pyprune chat smaller --temperature 0.7 --seed 3 < prompts.txt
  pyprune chat --compare DENSE smaller --web
"""


def register(cli: click.Group) -> None:
    params: list[click.Parameter] = [
        click.Argument(["model"], metavar="MODEL"),
        click.Option(["--compare"], type=str, metavar="PATH", help="Ask this model too; it stands on the left."),
        click.Option(["--prompt"], type=str, metavar="TEXT", help="Ask this and end."),
        click.Option(
            ["--max_new_tokens"], type=click.IntRange(1), default=256, show_default=True, metavar="N",
            help="The most tokens in an answer.",
        ),
        click.Option(
            ["--temperature"], type=float, default=0.0, show_default=True, metavar="NUMBER",
            help="Draw tokens from the softmax of logits / temperature; 0 takes the most likely one.",
        ),
        click.Option(
            ["--seed"], type=click.IntRange(0, MAX_SEED), default=0, show_default=True, metavar="N",
            help="Seed of the draws, set for every answer of every model.",
        ),
        click.Option(
            ["--dtype"], type=click.Choice(DTYPES), default="auto", show_default=True,
            help="Type of the weights; auto keeps the checkpoint's.",
        ),
        click.Option(
            ["--device"], type=str, default="auto", show_default=True, metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        ),
        click.Option(["--trust_remote_code"], is_flag=True, help="Run modelling code that comes with the checkpoint."),
        click.Option(["--web"], is_flag=True, help="In a page, for a browser. Needs pip install 'pyprune[web]'."),
        click.Option(
            ["--host"], type=str, default="127.0.0.1", show_default=True,
            help="Address of the page; 0.0.0.0 lets every machine in that reaches this one.",
        ),
        click.Option(
            ["--port"], type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port of the page."
        ),
        *common(),
    ]  # fmt: skip
    add_verb(cli, "chat", _run, params, HELP, EXAMPLES)


def _run(
    model: str, compare: str | None, prompt: str | None, max_new_tokens: int, temperature: float, seed: int, dtype: str,
    device: str, trust_remote_code: bool, web: bool, host: str, port: int, json: bool, quiet: bool,
) -> None:  # fmt: skip
    from pyprune import parsing

    _check(prompt, temperature, web, json)
    device = parsing.device()("device", device)
    if web:
        from pyprune.chat.page import check_installed

        check_installed()
    from pyprune.chat.speaker import Conversation, Sampling, open_speaker

    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    with reporting(quiet):
        speakers = [] if compare is None else [open_speaker(compare, **options, option="compare")]
        speakers.append(open_speaker(model, **options, option="MODEL"))
        talk = Conversation(speakers, Sampling(max_new_tokens, temperature, seed))
        if web:
            from pyprune.chat.page import serve

            serve(talk, host, port, say=lambda line: click.echo(line, err=True))
        else:
            _in_terminal(talk, prompt, json, quiet)


def _check(prompt: str | None, temperature: float, web: bool, json: bool) -> None:
    if not 0 <= temperature < math.inf:
        raise PyPruneError("temperature", temperature, "must be a number, at least 0", "0 takes the most likely token.")
    if web and (prompt is not None or json):
        problem = "opens a page, where prompts are typed"
        raise PyPruneError("web", None, problem, "Leave prompt and json out, or leave web out.")
    if prompt is not None and not prompt.strip():
        raise PyPruneError("prompt", prompt, "is empty", "Write something.")
    if json and prompt is None:
        raise PyPruneError("json", None, "is for the answers to one prompt", "Give prompt too.")


def _in_terminal(talk: Any, prompt: str | None, json: bool, quiet: bool) -> None:
    from rich.console import Console

    from pyprune.chat import terminal

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    if json:
        answers = terminal.last(talk, str(prompt))
        emit({"prompt": prompt, "answers": [a.to_dict() for a in answers]}, True, list)
    elif prompt is not None:
        terminal.show(talk, console, prompt)
    elif sys.stdin.isatty():
        if not quiet:
            for part in terminal.greeting(talk):
                console.print(part)
        terminal.converse(talk, console, terminal.typed(console))
    else:
        terminal.converse(talk, console, terminal.piped())

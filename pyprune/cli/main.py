"""The entry point: the verbs, and how every run ends (an exit status, and one line when it fails)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import click

from pyprune.cli import bench, chat, env, evaluate, export, inspect, prune, recover, report, run, score
from pyprune.cli.options import CONTEXT
from pyprune.errors import PyPruneError

MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143


class _Terminated(BaseException):
    """SIGTERM as an exception, so that an unfinished output folder is removed on the way out."""


class _Interrupted(BaseException):
    """Control-C, past click, which would print an empty line of its own."""


class _Verbs(click.Group):
    """Lists the verbs in the order in which they are registered."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(*interrupt.args) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Verbs, context_settings=CONTEXT, epilog="pyprune VERB --help shows the options of a verb, with examples."
)
@click.version_option(package_name="pyprune", message="%(prog)s %(version)s")
def cli() -> None:
    """Remove whole heads and channels from a language model: a smaller dense model.

    \b
    pyprune inspect MODEL                    what can be removed
    pyprune prune MODEL --ratio 0.2 ...      remove it, measure, save
    pyprune recover PRUNED --data TEXT ...   train it a little, save
    pyprune eval MODEL --eval_text TEXT      perplexity of a folder, pruned or not
    pyprune export MODEL --profile gguf ...  write it for other programs
    pyprune report PRUNED                    one page that shows it all
    pyprune chat PRUNED --compare DENSE      ask both the same
    pyprune run RECIPE                       the whole path from one file; again, only what has changed
    """


for _verb in (prune, inspect, score, recover, evaluate, export, report, chat, run, env, bench):
    _verb.register(cli)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake in the input, 130 when interrupted."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        return int(cli.main(args=args, prog_name="pyprune", standalone_mode=False) or 0)
    except PyPruneError as error:
        return _fail(error.render(_label(error.option)), MISTAKE)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return MISTAKE
    except click.ClickException as error:
        return _fail(error.format_message(), MISTAKE)
    except (_Interrupted, KeyboardInterrupt) as interrupt:
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has shown ^C on this line
        return _fail(". ".join(("interrupted", *map(str, interrupt.args))), INTERRUPTED)
    except _Terminated:
        return _fail("terminated", TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader
        return 1
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _label(option: str) -> str:
    """``--option`` when some verb has such a flag, else the bare name."""
    flags = {name for command in cli.commands.values() for param in command.params for name in param.opts}
    return f"--{option}" if f"--{option}" in flags else option


def _fail(message: str, status: int) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return status


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated

"""``pyprune bench``: how fast the kernels and scoring are here, beside stock PyTorch and the machine's own limits."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from pyprune.cli.options import add_verb, common
from pyprune.cli.output import emit, reporting

HELP = """Measure kernels and scoring on this machine.

Each line is measured in turn with eager PyTorch, with torch.compile of the same formula, and with a ceiling: a copy in
memory for what moves bytes, a large matrix product for what multiplies. Scoring is that of a whole random model beside
LLM-Pruner's procedure, with the peak memory of both.
"""

EXAMPLES = """
Examples:
  pyprune bench
  pyprune bench --device cuda --shapes llama-7b --output bench-7b
  pyprune bench --what salience --what slice --dtype bfloat16 --rounds 11
"""

SHAPES = ("llama-7b", "llama-3-8b", "smollm2", "tiny")
WHAT = ("salience", "many", "slice", "moments", "activations", "scoring")
TYPES = ("float32", "bfloat16", "float16")


def register(cli: click.Group) -> None:
    options: list[click.Parameter] = [
        click.Option(
            ["--device"], type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run."
        ),
        click.Option(
            ["--shapes"], type=click.Choice(SHAPES), default="smollm2", show_default=True,
            metavar=f"[{'|'.join(SHAPES)}]",  # click's own has underscores, which are as good
            help="The model whose sizes are taken.",
        ),
        click.Option(
            ["--dtype"], type=click.Choice(TYPES), default=None,
            help="Of weights and activations [float32 on cpu, bfloat16 on cuda].",
        ),
        click.Option(
            ["--what"], type=click.Choice([*WHAT, "all"]), multiple=True, default=["all"], show_default=True,
            help="What to measure; may be given several times.",
        ),
        click.Option(
            ["--rounds"], type=click.IntRange(1), default=7, show_default=True,
            help="Runs of each candidate, in turn; whole models at most 3.",
        ),
        click.Option(
            ["--compile/--no_compile", "compiler"], default=True, show_default=True,
            help="Measure torch.compile too; compiling takes a while.",
        ),
        click.Option(
            ["--output"], type=str, metavar="FOLDER", help="Write results.csv, results.md and results.png there."
        ),
        *common(),
    ]  # fmt: skip
    add_verb(cli, "bench", _run, options, HELP, EXAMPLES)


def _run(
    device: str, shapes: str, dtype: str | None, what: tuple[str, ...], rounds: int, compiler: bool,
    output: str | None, json: bool, quiet: bool,
) -> None:  # fmt: skip
    import torch

    from pyprune import preflight
    from pyprune.bench import output as written
    from pyprune.bench.run import Line, run

    preflight.device(device)
    if output is not None:
        written.check_plot(output)
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    parts = WHAT if "all" in what else tuple(p for p in WHAT if p in what)
    place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    told = written.facts("pyprune " + shlex.join(sys.argv[1:]))
    lines: list[Line] = []

    def keep(line: Line) -> None:
        lines.append(line)
        if output is not None:  # line by line, so that a run that is cut short leaves what it found
            written.write(output, lines, told)

    if output is not None:
        written.write(output, lines, told)
    with reporting(quiet):
        run(parts, shapes, kind, place, rounds, compiler, keep)
    if output is not None:
        written.plot(output, lines, told)
    data: dict[str, Any] = {"facts": told, "lines": [vars(line) for line in lines]}
    emit(data, json, lambda: ["\n".join(f"{k}: {v}" for k, v in told.items()), written.table(lines)])

"""``pyprune recover``: training after pruning."""

from __future__ import annotations

import os
from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import check_answers_shown, emit, going_on, reporting, teller
from pyprune.config import RecoverConfig

HELP = """Train MODEL a little, so that it recovers from pruning.

Low-rank adapters (LoRA) learn from --data and are merged into the weights: the result is a folder of the same kind as
MODEL. A part of the data is held out; the moment that is best on it is kept, the start included, so the result is
never worse there than MODEL.

Data are instructions (instruction, input, output), conversations (messages), prompt and completion, or plain text,
told apart by their fields. After an interruption the same command with --resume goes on from the last checkpoint.
Several processes: accelerate launch -m pyprune recover ..., or torchrun -m pyprune recover ...
"""

EXAMPLES = """
Examples:
  Half an hour on plain text and instructions, three tokens to one:
    pyprune recover smaller --data c4.jsonl.gz=3,dolly.jsonl.gz=1 --max_minutes 30 --output_dir recovered

  LLM-Pruner's published setting:
    pyprune recover smaller --preset llm-pruner --data yahma/alpaca-cleaned --output_dir recovered

  With the dense model as teacher, and perplexity on other text before and after:
    pyprune recover smaller --data c4.jsonl.gz --teacher dense --eval_text test.txt --output_dir recovered

  Merge an adapter that was kept:
    pyprune recover smaller --adapter recovered/adapter --output_dir merged
"""


def register(cli: click.Group) -> None:
    @verb(cli, RecoverConfig, "recover", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = RecoverConfig.build(flags, config)
        check_answers_shown(recipe.page, recipe.save.output_dir, json)
        from pyprune import recover_pipeline, report
        from pyprune.recover_preflight import work_folder

        helping = int(os.environ.get("RANK", "0")) > 0  # one of several processes; the first one speaks

        def how() -> str | None:
            work = work_folder(recipe)
            begun = work is not None and work.is_dir()
            return f"The same command with --resume goes on from {work}." if begun else None

        with reporting(quiet or helping), going_on(how):
            result = recover_pipeline.run(recipe, say=teller(quiet or helping))
        if result.main:
            emit(result.report, json, lambda: report.recovery_tables(result.report))

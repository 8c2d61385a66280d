"""``pyprune eval``: how good, how fast and how large a model is."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, reporting
from pyprune.config import EvaluationConfig

HELP = """Measure MODEL: perplexity, accuracy on tasks, speed and memory.

Perplexity: the text is tokenised once and cut into windows that do not overlap; in each window every token but the
first is scored. Figures compare only between equal texts, lengths and numbers of windows, which are printed too.

Tasks are multiple-choice questions, in files or by their names in lm-eval: acc takes the choice with the largest
log-likelihood, acc_norm the one with the largest log-likelihood a character.

Speed is that of stock greedy generation. With --compare both models run in turn.
"""

EXAMPLES = """
Examples:
  pyprune eval MODEL --eval_text test.txt
  pyprune eval MODEL --eval_text test.txt --protocol llm-pruner --eval_windows 32 --json
  pyprune eval MODEL --tasks piqa.jsonl.gz,arc_easy.jsonl --limit 200 --resume_file seen.jsonl --output result.json
  pyprune eval MODEL --tasks boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa
  pyprune eval PRUNED --compare DENSE --speed --eval_text test.txt
  pyprune eval MODEL --prompt "The capital of France is"
"""


def register(cli: click.Group) -> None:
    @verb(cli, EvaluationConfig, "eval", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = EvaluationConfig.build(flags, config)
        from pyprune import assess, report

        with reporting(quiet):
            result = assess.run(recipe)
        table = report.comparison_table if "compare" in result else report.evaluation_table
        emit(result, json, lambda: [table(result)])

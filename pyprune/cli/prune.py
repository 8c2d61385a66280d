"""``pyprune prune``: the whole line."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import SAME_COMMAND, check_answers_shown, emit, going_on, reporting, teller
from pyprune.config import PruneConfig

HELP = """Make MODEL smaller, measure it, save it.

MODEL is a Hugging Face folder or hub name. Say how much goes with --ratio, --target_params, --widths or
--remove_layers; a ratio counts the layers too. The output folder opens with AutoModelForCausalLM.from_pretrained
(trust_remote_code=True where layers differ, as after a ratio alone); beside the weights lie the kept indices, report
and recipe. A ratio alone measures how much each layer can lose: more than an hour for 135M parameters on a CPU.
--method plain scores the model once, in minutes, and keeps less of it.
With --profile (see `pyprune export --help`) the cut keeps to widths that other programs hold.
"""

EXAMPLES = """
Examples:
  Remove a fifth of the parameters, scored on your own text:
    pyprune prune MODEL --ratio 0.2 --calibration train.txt --output_dir smaller

  The same, with perplexity before and after on other text:
    pyprune prune MODEL --ratio 0.2 --calibration train.txt --eval_text test.txt --eval_length 512 --output_dir smaller

  Half of the FFN channels in layers 4 to 27, in multiples of 64, by weights alone (no text needed):
    pyprune prune MODEL --widths ffn=0.5 --layers 4-27 --round_to 64 --criterion l2 --output_dir smaller

  Units by Wanda, and what stays of each layer refitted by least squares on the same text:
    pyprune prune MODEL --ratio 0.2 --calibration train.txt --criterion wanda --compensation least-squares

  Three quarters of the dimensions of every head's values, in coordinates of which few carry most:
    pyprune prune MODEL --widths vo_dim=0.75 --value_basis principal --calibration train.txt --output_dir smaller

  Three whole layers, those that change the residual stream least, and nothing else:
    pyprune prune MODEL --remove_layers 3 --calibration train.txt --output_dir shorter

  The attention of four layers, and nothing else of them:
    pyprune prune MODEL --remove_layers 4 --layer_part attention --calibration train.txt --output_dir smaller

  A tenth of the layers, one by one where the loss rises least, then widths up to 25% in all:
    pyprune prune MODEL --remove_layers 0.1 --layer_criterion perplexity --ratio 0.25 --calibration train.txt

  Scores (and sums of refits) kept on the disk, so that a second ratio takes no scoring:
    pyprune prune MODEL --ratio 0.3 --calibration train.txt --cache scores --output_dir smaller30

  How much each layer loses searched for during an hour, on the model itself; a killed search goes on:
    pyprune prune MODEL --ratio 0.3 --calibration train.txt --allocation search --search_minutes 60 --output_dir smaller

  For llama.cpp: only widths that a GGUF file holds, and smaller/model.gguf at the end:
    pyprune prune MODEL --ratio 0.2 --calibration train.txt --profile gguf --output_dir smaller

  A model larger than memory, from a local folder; started again after a kill, it goes on where it was:
    pyprune prune FOLDER --stream --ratio 0.2 --calibration train.txt --output_dir smaller

  From a recipe, with one option changed, and the report as JSON:
    pyprune prune MODEL --config recipe.yaml --ratio 0.3 --output_dir smaller30 --json
"""


def register(cli: click.Group) -> None:
    @verb(cli, PruneConfig, "prune", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = PruneConfig.build(flags, config)
        check_answers_shown(recipe.page, recipe.save.output_dir, json)
        from pyprune import pipeline, report

        def how() -> str | None:
            from pyprune.schedule import search_file

            searched = recipe.select.allocation == "search" and search_file(recipe) is not None
            return SAME_COMMAND if recipe.streaming.stream or searched else None

        with reporting(quiet), going_on(how):
            result = pipeline.run(recipe, say=teller(quiet))
        emit(result.report.to_dict(), json, lambda: report.report_tables(result.report))

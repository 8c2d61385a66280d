"""``pyprune run``: the whole path from one recipe."""

from __future__ import annotations

import click

from pyprune.cli.options import add_verb, common
from pyprune.cli.output import SAME_COMMAND, emit, going_on, reporting, teller

HELP = """Run RECIPE: prune, recover, evaluate, export, report.

RECIPE is a YAML file: `model`, `output_dir` (the work folder), and a section for each stage that shall run (prune,
recover, eval, export, report). A section holds the options of the verb of that name, as its --help lists them; those
that follow from model and output_dir are left out. Paths in it are read from the working directory, as flags are.

A stage is left alone while its options, the bytes of its inputs, the bytes of its output and pyprune's version are what
they were. When it runs, those that read from it run too. After an interruption the same command goes on.

\b
model: meta-llama/Llama-2-7b-hf          or a section: model_name_or_path, dtype, device, trust_remote_code
output_dir: runs/llama-20                pruned/, recovered/, eval/, report.html and run.json go there
prune: {ratio: 0.2, calibration: train.txt}
recover: {data: train.jsonl, max_minutes: 60}
eval: {eval_text: test.txt}              of the dense, the pruned and the recovered model
export: {profile: gguf, dtype: float16}  of the last of them
report: {}                               a page that shows it all
"""

EXAMPLES = """
Examples:
  pyprune run recipes/llama-20.yaml --dry_run
  pyprune run recipes/llama-20.yaml
  pyprune run recipes/llama-20.yaml --until eval
  pyprune run recipes/llama-20.yaml --force recover
  pyprune run recipes/llama-20.yaml --model other/model --output_dir runs/other
"""


def register(cli: click.Group) -> None:
    params: list[click.Parameter] = [
        click.Argument(["recipe"], metavar="RECIPE"),
        click.Option(["--model"], type=str, metavar="PATH", help="The dense model, in place of the recipe's."),
        click.Option(["--output_dir"], type=str, metavar="FOLDER", help="The work folder, in place of the recipe's."),
        click.Option(["--until"], type=str, metavar="STAGE", help="Stop after this stage."),
        click.Option(
            ["--force"], type=str, metavar="STAGE", multiple=True,
            help="Run this stage, changed or not, and those that read from it; may be given several times.",
        ),
        click.Option(["--dry_run"], is_flag=True, help="Say what would run and why, and do nothing."),
        *common(),
    ]  # fmt: skip
    add_verb(cli, "run", _run, params, HELP, EXAMPLES)


def _run(
    recipe: str, model: str | None, output_dir: str | None, until: str | None, force: tuple[str, ...], dry_run: bool,
    json: bool, quiet: bool,
) -> None:  # fmt: skip
    from pyprune.runs import run_recipe
    from pyprune.runs.table import run_table

    with reporting(quiet), going_on(lambda: SAME_COMMAND):
        result = run_recipe(
            recipe, model=model, output_dir=output_dir, until=until, force=force, dry_run=dry_run, say=teller(quiet)
        )
    emit(result.to_dict(), json, lambda: [run_table(result)])

"""Click options made from the recipe dataclasses, and help that groups them by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pyprune.config import Recipe
from pyprune.stage_options import METHODS

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("-", "_"),  # --output-dir is --output_dir
    "max_content_width": 110,
}


class StageOption(click.Option):
    """An option that belongs to a stage of the recipe."""

    stage = ""


class Verb(click.Command):
    """A command whose help lists its options stage by stage."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Option) and record is not None:
                sections.setdefault(getattr(param, "stage", ""), []).append(record)
        run = sections.pop("")
        for title, records in (*sections.items(), ("Run", run)):
            with formatter.section(title):
                formatter.write_dl(records, col_max=36)


def add_verb(
    group: click.Group, name: str, callback: Callable[..., Any], params: list[click.Parameter], help: str, examples: str
) -> click.Command:
    """Add a verb to ``group``. The first line of ``help`` stands in the list of verbs; ``examples`` are printed as they
    stand."""
    text = "\b\n" + examples.strip("\n").replace("\n\n", "\n\n\b\n")  # \b: click leaves the lines as they are
    command = Verb(
        name, context_settings=CONTEXT, callback=callback, params=params, help=help,
        short_help=help.strip().splitlines()[0], epilog=text,
    )  # fmt: skip
    group.add_command(command)
    return command


def verb(
    group: click.Group, recipe: type[Recipe], name: str, help: str, examples: str
) -> Callable[[Callable[..., Any]], click.Command]:
    """Register a function as a verb of ``group``, whose options are those of ``recipe``.

    The function gets ``flags`` (option name -> what was given, None where nothing was), ``config`` (recipe file or
    None), ``json`` and ``quiet``.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        config = click.Option(["--config"], type=str, metavar="YAML", help="Recipe file; flags win over it.")
        params = [*_options(recipe), config, *common()]
        names = {f.name for _, f in recipe.options()}

        def callback(**values: Any) -> None:
            positional = values.pop("model", None)
            flags = {k: values.pop(k) for k in list(values) if k in names}
            if positional is not None:
                if flags.get("model_name_or_path") not in (None, positional):
                    raise click.UsageError("The model is given twice, as argument and as --model_name_or_path.")
                flags["model_name_or_path"] = positional
            function(flags=flags, **values)

        return add_verb(group, name, callback, params, help, examples)

    return decorate


def _options(recipe: type[Recipe]) -> list[click.Parameter]:
    params: list[click.Parameter] = [click.Argument(["model"], required=False, metavar="[MODEL]")]
    titles = {name: f"{name.capitalize()}: {(cls.__doc__ or '').strip(' .')}" for name, cls in recipe.stages().items()}
    for stage, f in recipe.options():
        parse = f.metadata["parse"]
        usual = [_plain(f.default)] if f.default is not None else []
        if f.name in METHODS["best"] and "method" in {g.name for _, g in recipe.options()}:
            usual.append(f"method best: {_plain(METHODS['best'][f.name])}")
        shown = f" [{'; '.join(usual)}]" if usual else ""
        names = [f"--{f.name}/--no_{f.name}"] if parse.flag else [f"--{f.name}"]
        kind: dict[str, Any] = {} if parse.flag else {"type": str, "metavar": parse.metavar}
        param = StageOption([*names, f.name], default=None, help=f.metadata["help"] + shown, **kind)
        param.stage = titles[stage]
        params.append(param)
    return params


def _plain(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def common() -> list[click.Parameter]:
    """What every verb takes."""
    help = "No progress, warnings or notes on stderr; results and errors stay."
    return [json_flag(), click.Option(["--quiet", "-q", "quiet"], is_flag=True, help=help)]


def json_flag() -> click.Option:
    return click.Option(["--json", "json"], is_flag=True, help="Print the result as JSON, and nothing else.")

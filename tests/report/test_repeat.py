"""Commands on the page: what they say, the command line reads back."""

from __future__ import annotations

import shlex
from typing import Any

import click
import pytest

from pyprune.cli.main import cli
from pyprune.config import EvaluationConfig, PruneConfig, Recipe, RecoverConfig
from pyprune.repeat import command


def read_back(verb: str, recipe: type[Recipe], line: str) -> Recipe:
    """The recipe that a command line gives, by the command line's own parser."""
    words = shlex.split(line)
    assert words[:2] == ["pyprune", verb]
    context = click.Context(cli.commands[verb])
    cli.commands[verb].parse_args(context, words[2:])
    given = {k: v for k, v in context.params.items() if k not in ("config", "json", "quiet", "model")}
    if context.params["model"] is not None:
        given["model_name_or_path"] = context.params["model"]
    return recipe.build(given)


@pytest.mark.parametrize(
    ("verb", "recipe", "options"),
    [
        ("prune", PruneConfig, {"model_name_or_path": "my model", "ratio": 0.2}),
        (
            "prune",
            PruneConfig,
            {
                "model_name_or_path": "m", "widths": {"ffn": 0.5, "kv_heads": 2}, "round_to": {"ffn": 64},
                "roles": "ffn,kv_heads", "layers": "4-7", "min_keep": 0.25, "count_embeddings": False, "report": False,
                "calibration": "it's here.txt", "prompt": "two\nlines", "overwrite": True, "profile": "gguf",
                "generations": 0, "allocation_criterion": "group_fisher", "max_shard_size": "1GB",
            },
        ),
        ("recover", RecoverConfig, {"model_name_or_path": "m", "data": "a.jsonl=3,b.txt=1", "packing": False}),
        ("recover", RecoverConfig, {"model_name_or_path": "m", "data": "a.jsonl,b.txt", "max_tokens": "2M"}),
        (
            "eval",
            EvaluationConfig,
            {"model_name_or_path": "m", "eval_text": "t.txt", "tasks": "piqa,x.jsonl", "speed": True, "compare": "d"},
        ),
    ],
)  # fmt: skip
def test_a_command_gives_the_recipe_that_it_was_made_of(verb: str, recipe: Any, options: dict[str, Any]) -> None:
    wanted = recipe.build(options)
    line = command(verb, recipe, wanted.to_dict(), "recipe.yaml")
    assert read_back(verb, recipe, line).to_dict() == wanted.to_dict()


def test_defaults_are_left_out_and_a_list_of_prompts_is_left_to_the_recipe() -> None:
    plain = PruneConfig.build({"model_name_or_path": "m", "ratio": 0.5}).to_dict()
    assert command("prune", PruneConfig, plain, "r.yaml") == "pyprune prune m --ratio 0.5"
    listed = PruneConfig.build({"model_name_or_path": "m", "ratio": 0.5, "prompts": ["a", "b"]}).to_dict()
    assert command("prune", PruneConfig, listed, "r.yaml") == "pyprune prune m --ratio 0.5 --config r.yaml"
    assert command("prune", PruneConfig, {**plain, "gone": 3}, "r.yaml") == "pyprune prune m --ratio 0.5"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"criterion": "l2"}, "--criterion l2"), ({"method": "plain"}, "--method plain"),
     ({"allocation": "global"}, "--allocation global"),
     ({"method": "best", "criterion": "flap"}, "--criterion flap --method best")],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_the_method_is_named_where_the_other_options_do_not_tell_it(options: dict[str, str], words: str) -> None:
    recipe = PruneConfig.build({"model_name_or_path": "m", "ratio": 0.5, **options})
    line = command("prune", PruneConfig, recipe.to_dict(), "r.yaml")
    assert sorted(line.split()) == sorted(f"pyprune prune m --ratio 0.5 {words}".split())

"""Help: complete, quick, and with examples that run as they stand."""

from __future__ import annotations

import os
import re
import shlex

import pytest
from helpers_fresh import PACKAGE, run_fresh
from helpers_run import pyprune, python

from pyprune.cli.main import cli
from pyprune.config import (
    RECIPES,
    EvaluationConfig,
    ExportingConfig,
    InspectConfig,
    PruneConfig,
    RecoverConfig,
    ReportingConfig,
    ScoringConfig,
)

VERBS = {
    "prune": PruneConfig, "inspect": InspectConfig, "score": ScoringConfig, "recover": RecoverConfig,
    "eval": EvaluationConfig, "export": ExportingConfig, "report": ReportingConfig, "chat": None,
    "run": None, "env": None, "bench": None,
}  # fmt: skip


def test_the_verbs_are_listed_in_the_order_of_a_run(call) -> None:
    shown = call("--help")
    assert shown.status == 0
    commands = shown.out[shown.out.index("Commands:") :]
    assert re.findall(r"^  (\w+)  ", commands, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option_and_teaches_by_example(verb: str, call) -> None:
    shown = call(verb, "--help")
    assert shown.status == 0
    options = [f.name for _, f in VERBS[verb].options()] if VERBS[verb] else []
    for name in options:
        assert re.search(rf"--{name}\b", shown.out), name
    assert f"pyprune {verb}" in shown.out[shown.out.index("Examples:") :]


@pytest.mark.parametrize("verb", VERBS)
def test_examples_use_options_that_exist(verb: str) -> None:
    flags = {flag for p in cli.commands[verb].params for flag in (*p.opts, *p.secondary_opts)}
    examples = cli.commands[verb].epilog
    lines = [line.strip() for line in examples.splitlines() if line.strip().startswith(f"pyprune {verb}")]
    assert lines
    for line in lines:
        assert {w for w in shlex.split(line) if w.startswith("--")} <= flags, line


def test_every_recipe_belongs_to_a_verb() -> None:
    assert set(RECIPES) == {r for r in VERBS.values() if r}


def test_help_appears_within_a_second_and_without_torch() -> None:
    before = os.times()
    ended = pyprune("prune", "--help")
    after = os.times()
    assert ended.status == 0
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0  # processor time: the wall clock of a busy machine says little
    script = (
        "import sys\nfrom pyprune.cli.main import main\n"
        f"for verb in {list(VERBS)}: main([verb, '--help'])\n"
        "print('heavy:', sorted({'torch', 'numpy', 'transformers', 'rich', 'yaml'} & sys.modules.keys()))"
    )
    assert python("-c", script).out.strip().endswith("heavy: []")


def test_the_package_adds_little_to_the_import_of_torch() -> None:
    script = "import torch, time\nt = time.process_time()\nimport pyprune\nprint(time.process_time() - t)"
    assert float(python("-c", script).out) < 0.1


def test_every_public_name_resolves() -> None:
    script = (
        "import pyprune\nfor name in pyprune.__all__: assert getattr(pyprune, name) is not None, name\n"
        "assert pyprune.__version__ and set(pyprune.__all__) <= set(dir(pyprune))\n"
        "try: pyprune.nothing\nexcept AttributeError as e: print(e)"
    )
    ended = run_fresh(script, cwd=PACKAGE, path=(PACKAGE,))
    assert ended.out.strip() == "module 'pyprune' has no attribute 'nothing'", ended.err


def test_no_arguments_show_the_help_with_status_2(call) -> None:
    shown = call()
    assert shown.status == 2
    assert "Commands:" in shown.out

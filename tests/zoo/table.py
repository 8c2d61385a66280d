"""The table of docs/zoo.md: ``python tests/zoo/table.py > docs/zoo.md``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "tests", ROOT / "tests" / "zoo"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from harness import STAGES, Outcome, check, has_family, model_types, without_families  # noqa: E402

TEXT = """# Every causal language model of transformers {version}

Each entry of the causal-LM mapping, built with a few dozen channels and random weights of order one, goes through the
oracle. This page is made by `python tests/zoo/table.py > docs/zoo.md`; tests compare it with what they find.

| stage | what passes |
|---|---|
| built | constructed and run, logits finite |
| discovered | FFN channels (or those of a state-space block) can be pruned, and heads where there are two or more |
| shuffled | permuting the units of any prunable group, of whatever role, changes no logit |
| sliced | half of the FFN channels and heads cut away: the logits equal those of the masked model to 1e-4 |
| backward | gradients reach every parameter that they reached before |
| generated | cached generation gives the tokens of uncached generation |
| reloaded | saved and loaded, the logits are equal bit for bit |

A dash says that the check says nothing about pruning, for the reason in the last column. "Narrow layers" are cuts that
no configuration of the class expresses: such a folder is opened by `pyprune.load` only. In the column "groups" are
prunable and all groups of each role.

{numbers}

| model type | groups | {stages} | notes |
|---|---|{rule}|---|
{rows}
"""


def row(outcome: Outcome) -> str:
    """The line of one model."""
    marks = ["yes" if s in outcome.passed else "no" if s in outcome.failed else "-" if s in outcome.exempt else ""
             for s in STAGES]  # fmt: skip
    groups = ", ".join(f"{role} {some}/{all_}" for role, (some, all_) in outcome.roles.items() if role not in _ALWAYS)
    return f"| {outcome.model_type} | {groups} | {' | '.join(marks)} | {_notes(outcome)} |"


_ALWAYS = ("vocab", "channels", "hidden", "layers")


def _notes(outcome: Outcome) -> str:
    told = [f"{stage}: {reason}" for stage, reason in (*outcome.failed.items(), *outcome.exempt.items())]
    text = "; ".join([*outcome.notes, *told])
    # Temporary folders and rounding are different in every run.
    text = re.sub(r"'[^' ]*/saved'", "", text)
    text = re.sub(r"\(\d[\d.e+-]*\)|by \d[\d.e+-]*$", "", text)
    return " ".join(text.replace("|", "/").replace("<", "").replace(">", "").split())


def numbers(outcomes: Iterable[Outcome], alone: Iterable[Outcome]) -> str:
    """The shares, in words: of the models that were built, with family adapters and without."""
    found, bare = list(outcomes), list(alone)
    built = [o for o in found if "built" in o.passed]
    passed = sum(o.complete for o in found)
    without = sum(o.complete for o in bare)
    wrong = sum("WRONG" in reason for o in found for reason in o.failed.values())
    return (
        f"{len(built)} of {len(found)} are built. Of those, {passed} ({passed / len(built):.0%}) pass everything, "
        f"{without} ({without / len(built):.0%}) with no family adapter. "
        f"Models with a group whose removal is not what it says: {wrong}."
    )


def page() -> str:
    """The whole page; runs every model (minutes)."""
    import transformers

    outcomes, alone = [], []
    for model_type in model_types():
        outcome = check(model_type)
        outcomes.append(outcome)
        if has_family(model_type):
            with without_families():
                alone.append(check(model_type))
        else:
            alone.append(outcome)
    return TEXT.format(
        version=transformers.__version__, numbers=numbers(outcomes, alone), stages=" | ".join(STAGES),
        rule="---|" * (len(STAGES) - 1) + "---", rows="\n".join(map(row, outcomes)),
    )  # fmt: skip


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # what models print is not part of the page
    text = page()
    sys.stdout = out
    print(text, end="")

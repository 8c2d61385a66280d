"""Tasks by their names in lm-evaluation-harness: its prompts, records and metrics, our log-likelihoods.

The package ``lm-eval`` (extra ``tasks``) makes the questions, from data sets on the Hugging Face hub, and computes the
metrics. The log-likelihoods come from :mod:`pyprune.evaluation.loglikelihood`, which keeps its rules; results can so be
resumed, and models with per-layer widths are scored like any other.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from typing import Any

from pyprune.errors import PyPruneError
from pyprune.evaluation.loglikelihood import Likelihood
from pyprune.evaluation.tasks import Accuracy

STOCK = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

Scorer = Callable[[Sequence[tuple[str, str]], str], list[Likelihood]]


def check_installed(name: str) -> None:
    """Raises PyPruneError when lm-eval, which task ``name`` needs, or a package that it needs is not installed."""
    try:
        import_module("lm_eval.evaluator")
    except ImportError as error:
        hint = "pip install 'pyprune[tasks]', or give a task file (.jsonl)."
        raise PyPruneError("tasks", name, f"needs the package lm-eval, which does not load: {error}", hint) from None


def stock_accuracies(score: Scorer, tasks: Sequence[Any], limit: int | None = None) -> list[Accuracy]:
    """Accuracies on tasks of lm-eval, zero-shot.

    Args:
        score: ((context, continuation) pairs, label) -> likelihoods.
        tasks: names that lm-eval knows, or task configurations as it takes them.
        limit: the first so many questions of each.

    Raises:
        PyPruneError: a task's data cannot be had, or it is not multiple choice.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    named = any(isinstance(t, str) for t in tasks)
    try:
        # Its own bars and notes are left out; ours are shown. Standard errors of means need no bootstrap, but 0 would
        # switch them off too.
        shown = sys.stderr
        with redirect_stderr(io.StringIO()):
            found = lm_eval.simple_evaluate(
                model=_adapter(score, shown), tasks=list(tasks), num_fewshot=0, limit=limit,
                bootstrap_iters=1, log_samples=False, verbosity=logging.ERROR,
                task_manager=TaskManager(include_defaults=named),
            )  # fmt: skip
    except PyPruneError:
        raise
    except Exception as error:  # hub, network and builder errors are of many unrelated kinds
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        shown = ",".join(t if isinstance(t, str) else str(t.get("task")) for t in tasks)
        raise PyPruneError(
            "tasks", shown, f"cannot be run by lm-eval: {first}", "Check the network, or give a task file (.jsonl)."
        ) from error
    assert found is not None  # it is None on other ranks of a distributed run
    counts = found["n-samples"]
    return [_accuracy(name, r, counts[name]["effective"]) for name, r in found["results"].items()]


def _accuracy(name: str, result: dict[str, Any], count: int) -> Accuracy:
    if "acc,none" not in result:
        raise PyPruneError("tasks", name, "has no metric acc", "Choose a multiple-choice task.")
    errors = [result.get(f"{m}_stderr,none") for m in ("acc", "acc_norm")]
    acc_error, norm_error = (e if isinstance(e, float) else None for e in errors)  # "N/A" for a single question
    norm = result.get("acc_norm,none")
    acc_norm = None if norm is None else float(norm)
    return Accuracy(name, float(result["acc,none"]), acc_error, acc_norm, norm_error, count, "lm-eval")


def _adapter(score: Scorer, shown: Any) -> Any:
    """A model as lm-eval sees it; ``shown`` is where scoring may draw its bar."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            with redirect_stderr(shown):
                found = score([r.args for r in requests], "tasks by lm-eval")
            return [(one.total, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise self._refused()

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise self._refused()

        @staticmethod
        def _refused() -> PyPruneError:
            return PyPruneError("tasks", None, "a task is not multiple choice", f"Known: {', '.join(STOCK)}.")

    return Adapter()

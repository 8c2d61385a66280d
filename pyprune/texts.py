"""What models are measured on and asked, as the options say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import sample_prompts
from pyprune.evaluation.perplexity import read_windows
from pyprune.evaluation.protocols import PROTOCOLS
from pyprune.importance.sources import NO_TOKENIZER, asked_prefix, behind_prefix
from pyprune.preflight import check_length
from pyprune.stage_options import EvalConfig


def evaluation_windows(config: EvalConfig, model: Any, tokenizer: Any) -> tuple[Tensor | None, str]:
    """Windows of the evaluation text, without what each is begun with, and its name; None without one."""
    if config.prompt is not None and tokenizer is None:
        raise PyPruneError("prompt", config.prompt, "there is no tokenizer to read it with", NO_TOKENIZER)
    if config.eval_text is None:
        return None, ""
    check_length("eval_length", config.eval_length, model)
    length = behind_prefix(window_prefix(config, tokenizer), config.eval_length, "eval_length")
    return read_windows(
        config.eval_text, tokenizer, length=length, windows=config.eval_windows, field=config.eval_text_field,
        special_tokens=config.protocol is not None and PROTOCOLS[config.protocol].special_tokens,
    )  # fmt: skip


def window_prefix(config: EvalConfig, tokenizer: Any) -> list[int]:
    """Token ids that every evaluation window begins with."""
    return asked_prefix(tokenizer, "eval_bos") if config.eval_bos else []


def page_prompts(recipe: Any, tokenizer: Any, stored: Sequence[Mapping[str, str]] = ()) -> list[str]:
    """What the models are asked for the page: as told, else what ``stored`` samples asked, else a few where models run
    on text anyway; nothing unless there is a page to show it.

    Args:
        recipe: of prune or recover.
        stored: {"prompt", ...} that are in the report already.

    Raises:
        PyPruneError: prompts cannot be read, or there are fewer than asked for, or no tokenizer to read them with.
    """
    page, measured = recipe.page, recipe.evaluation
    if page.generations is None and page.prompts is None:
        if not page.report or recipe.save.output_dir is None or tokenizer is None:
            return []
        runs = measured.eval_text is not None or measured.prompt is not None
        return [one["prompt"] for one in stored] or (sample_prompts(None, None) if runs else [])
    found = sample_prompts(page.prompts, page.generations)
    if found and tokenizer is None:
        raise PyPruneError("generations", len(found), "there is no tokenizer to read prompts with", NO_TOKENIZER)
    return found

"""Every causal language model of the installed transformers against the oracle, and docs/zoo.md against that."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from harness import STAGES, check, model_types
from table import row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
NAMED = (
    "llama bloom qwen2 qwen3 qwen3_moe mistral mixtral gemma2 gemma3_text phi3 gpt2 gpt_neox gptj opt falcon stablelm "
    "cohere olmo2 granite deepseek_v2 deepseek_v3 gpt_oss mamba jamba"
).split()
# The named families and every twelfth of the others run always.
FAST = [m for i, m in enumerate(model_types()) if m in NAMED or i % 12 == 0]
REST = [m for m in model_types() if m not in FAST]


def documented() -> dict[str, str]:
    """Model type -> its line in the page."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count("|") > len(STAGES) + 2]
    return {line.split("|")[1].strip(): line for line in lines[1:] if not line.startswith("|---")}


def assert_as_documented(model_type: str) -> None:
    outcome = check(model_type, seconds=120)
    wrong = [f"{stage}: {reason}" for stage, reason in outcome.failed.items() if "WRONG" in reason]
    assert not wrong, wrong
    if transformers.__version__ in PAGE.read_text(encoding="utf-8").splitlines()[0]:
        assert row(outcome) == documented()[model_type], "run: python tests/zoo/table.py > docs/zoo.md"


@pytest.mark.parametrize("model_type", FAST)
def test_no_group_is_wrong_and_the_table_is_up_to_date(model_type):
    assert_as_documented(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REST)
def test_no_group_is_wrong_and_the_table_is_up_to_date_for_the_others(model_type):
    assert_as_documented(model_type)


def test_the_table_lists_every_entry_of_the_mapping_once():
    if transformers.__version__ not in PAGE.read_text(encoding="utf-8").splitlines()[0]:
        pytest.skip("the table is for another version of transformers")
    assert list(documented()) == model_types()

"""The command line on a real pretrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_fresh import run_fresh
from helpers_run import write_text

pytestmark = pytest.mark.real_model


PLAIN = ("--criterion", "param_first", "--generations", "0")
KNAPSACK = (
    "--method", "best", "--allocation", "knapsack", "--compensation_scope", "outputs", "--no_compensation_gains",
)  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [PLAIN, pytest.param(KNAPSACK, marks=pytest.mark.slow), pytest.param((), marks=pytest.mark.slow)],
    ids=["plain", "knapsack", "whole"],
)
def test_a_fifth_of_smollm2_goes_and_it_still_speaks_english(
    call, smollm2_path: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    train, test = write_text(tmp_path / "train.txt", 40_000), write_text(tmp_path / "test.txt", 8_000, skip=60_000)
    ended = call(
        "prune", str(smollm2_path), "--ratio", "0.2", "--calibration", str(train), "--samples", "3", "--length", "170",
        "--eval_text", str(test), "--eval_length", "128", "--eval_windows", "4", "--prompt", "The for statement is",
        "--max_new_tokens", "12", "--output_dir", str(tmp_path / "out"), "--json", *how,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    counts = report["parameters"]["with_embeddings"]
    assert counts["before"] == 134_515_008
    assert counts["ratio"] == pytest.approx(0.2, abs=0.0005)
    before, after = (report["perplexity"][k]["perplexity"] for k in ("before", "after"))
    assert 5 < before < after < 3 * before  # choosing at random multiplies it by more than a hundred
    assert report["continuation"]["after"].strip().isprintable()

    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)\n"
        "t = AutoTokenizer.from_pretrained('out')\n"
        "inputs = t('The with statement is used to', return_tensors='pt')\n"
        "torch.save((inputs.input_ids, m(**inputs).logits.detach(), m.num_parameters()), 'logits.pt')\n"
        "runs = [m.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)]\n"
        "assert torch.equal(*runs)\n"
        "assert not any(name.startswith('pyprune') for name in sys.modules)"
    )
    opened = run_fresh(script, cwd=tmp_path)
    assert opened.status == 0, opened.err
    ids, logits, parameters = torch.load(tmp_path / "logits.pt")
    assert parameters == counts["after"]

    import pyprune

    with torch.no_grad():
        assert torch.equal(pyprune.load(tmp_path / "out")(ids).logits, logits)

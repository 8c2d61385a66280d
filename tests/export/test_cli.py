"""`pyprune export` as a user runs it."""

from __future__ import annotations

import json

import helpers_export as x
import helpers_surgery as h
import pytest

from pyprune.checkpoint import save
from pyprune.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save(x.made(), x.bpe_tokenizer(), tmp_path / "smaller")


def call(capfd, *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main(arguments)
    return status, *capfd.readouterr()


def test_a_file_is_written_and_named(folder, capfd) -> None:
    status, out, err = call(capfd, "export", "smaller", "--profile", "gguf", "--dtype", "float16", "--output", "s.gguf")
    assert status == 0 and err == ""
    assert "s.gguf" in out and "profile gguf" in out
    status, out, _ = call(capfd, "export", "smaller", "--profile", "hetero-hf", "--output", "hf", "--json")
    data = json.loads(out)
    assert status == 0 and data["profile"] == "hetero-hf"
    assert data["files"]["modeling_pyprune.py"] == (folder.parent / "hf/modeling_pyprune.py").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaller", "--profile", "gguf"], "error: --output: nothing says where to write"),
        (["--output", "x"], "error: --model_name_or_path: no model is given"),
        (["smaller", "--output", "x"], "error: --profile 'uniform': wants one intermediate_size"),
        (["smaller", "--profile", "hetero-decilm", "--output", "x"], "error: --profile 'hetero-decilm'"),
        (["smaller", "--profile", "uniforn", "--output", "x"], "Did you mean 'uniform'?"),
        (["smaller", "--profile", "hetero-hf", "--output", "smaller"], "error: --output 'smaller': exists already"),
        (["nothing", "--output", "x"], "error: --model_name_or_path"),
    ],
)
def test_mistakes_are_one_line_with_status_2(folder, capfd, arguments, message) -> None:
    status, out, err = call(capfd, "export", *arguments)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1
    assert sorted(p.name for p in folder.parent.iterdir()) == ["smaller"]


def test_help_explains_every_profile(capfd) -> None:
    status, out, _ = call(capfd, "export", "--help")
    assert status == 0
    for name, reader in {
        "uniform": "vLLM", "hetero-hf": "modelling file", "hetero-decilm": "DeciLMForCausalLM", "gguf": "llama.cpp",
    }.items():  # fmt: skip
        [line] = [line for line in out.splitlines() if line.strip().startswith(f"{name}  ")]
        assert reader in line


def test_a_narrow_head_count_is_exported_as_the_class_it_was_saved_as(tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="saved as MistralForCausalLM"):
        save(x.made("llama", h.uniform, hidden_size=40), None, tmp_path / "in")
    assert call(capfd, "export", "in", "--output", "out", "-q")[0] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"

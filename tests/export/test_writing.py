"""Export as a whole: what is copied, what is refused, and nothing half-written."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import helpers_export as x
import helpers_surgery as h
import pytest
import torch
from safetensors import safe_open

import pyprune
from pyprune import parsing
from pyprune.checkpoint import load, save
from pyprune.checkpoint.profiles import PROFILES, gguf_file, weights
from pyprune.errors import PyPruneError


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with per-layer widths, in several files, with a tokenizer and a plan."""
    model = h.tiny("llama", vocab_size=300)
    plan = h.ragged(model)
    from pyprune.surgery import apply

    tokenizer = x.bpe_tokenizer("{{ messages }}")
    return save(apply(model, plan), tokenizer, tmp_path / "in", plan=plan, max_shard_size="50KB")


def test_a_folder_keeps_its_weights_bit_by_bit_and_its_other_files(folder, tmp_path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"old")
    out = pyprune.export(folder, tmp_path / "out", "hetero-hf")
    before, after = everything(folder), everything(out)
    assert len([n for n in after if n.endswith(".safetensors")]) > 2
    same = [n for n in before if n not in ("config.json", "README.md", "pytorch_model.bin")]
    assert {n: after.get(n) for n in same} == {n: before[n] for n in same}
    assert after.keys() - before.keys() == {"modeling_pyprune.py"}
    assert "pytorch_model.bin" not in after
    assert torch.equal(h.logits(load(out)), h.logits(load(folder)))


def test_a_folder_and_the_model_in_memory_give_the_same_file(folder, tmp_path) -> None:
    model = load(folder)
    one = pyprune.export(folder, tmp_path / "one.gguf", "gguf")
    two = pyprune.export(model, tmp_path / "two.gguf", "gguf", tokenizer=x.bpe_tokenizer("{{ messages }}"))
    import gguf

    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(f).tensors} for f in (one, two)]
    assert tensors[0] == tensors[1]
    assert {p.requires_grad for p in model.parameters()} == {True}  # the model is left as it was


@pytest.mark.parametrize("source", ["folder", "model"])
def test_weights_are_cast_when_asked(folder, tmp_path, source) -> None:
    given = folder if source == "folder" else load(folder)
    out = pyprune.export(given, tmp_path / "out", "hetero-hf", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(n).dtype for n in opened.keys()} == {torch.bfloat16}
    index = out / "model.safetensors.index.json"
    if index.is_file():
        size = sum(p.numel() * 2 for p in load(folder).parameters())
        assert json.loads(index.read_text())["metadata"]["total_size"] == size
    loaded = load(out)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in load(folder).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16))


def test_the_options_names_are_those_of_the_profiles() -> None:
    assert parsing.PROFILES == tuple(PROFILES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "gguff"}, r"profile 'gguff': is not known. Did you mean 'gguf'\?"),
        ({"dtype": "int8"}, r"dtype 'int8': is not known"),
        ({"profile": "gguf", "output": "out"}, r"output 'out': is no name for a GGUF file.* Name it out.gguf"),
        ({"profile": "gguf", "output": "not/there.gguf"}, r"output 'not/there.gguf': cannot be made"),
    ],
)
def test_mistakes_name_the_option_and_the_way_out(options, message) -> None:
    with pytest.raises(PyPruneError, match=message):
        pyprune.export("unused", **{"output": "out", **options})


@pytest.mark.parametrize(("profile", "name"), [("hetero-hf", "out"), ("gguf", "out.gguf")])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_opened(
    tmp_path, monkeypatch, profile, name
) -> None:
    monkeypatch.setattr("pyprune.checkpoint.atomic.os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PyPruneError, match=rf"output '.*{name}': cannot be made: .* is not a folder that can be"):
        pyprune.export("unused", tmp_path / name, profile)


@pytest.mark.parametrize(("profile", "name"), [("hetero-hf", "o" * 240), ("gguf", "o" * 235 + ".gguf")])
def test_a_name_that_is_too_long_while_it_is_written_is_refused_before_the_model_is_opened(
    tmp_path, profile, name
) -> None:
    with pytest.raises(PyPruneError, match=r"output .*: is too long a name: 18 characters more are needed"):
        pyprune.export("unused", tmp_path / name, profile)


def test_the_part_of_a_gguf_file_that_a_killed_process_left_goes(folder, tmp_path) -> None:
    (tmp_path / ".out.gguf.0123abcd.partial").mkdir()
    pyprune.export(folder, tmp_path / "out.gguf", "gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.gguf"]


@pytest.mark.parametrize(("profile", "name"), [("hetero-hf", "out"), ("gguf", "out.gguf")])
def test_an_existing_output_stays_unless_overwrite(folder, tmp_path, profile, name) -> None:
    pyprune.export(folder, tmp_path / name, profile)
    before = everything(tmp_path)
    with pytest.raises(PyPruneError, match=rf"output '.*{name}': exists already. Set overwrite"):
        pyprune.export(folder, tmp_path / name, profile)
    assert everything(tmp_path) == before
    pyprune.export(folder, tmp_path / name, profile, dtype="float16", overwrite=True)
    assert everything(tmp_path) != before


@pytest.mark.parametrize(("profile", "name"), [("hetero-hf", "out"), ("gguf", "out.gguf")])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), PyPruneError),
        (OSError("20480 requested and 64 written"), PyPruneError),  # NumPy's tofile
        (KeyboardInterrupt(),) * 2,
    ],
)
def test_a_failing_write_leaves_what_was_there(folder, tmp_path, monkeypatch, profile, name, error, raised) -> None:
    pyprune.export(folder, tmp_path / name, profile)
    before = everything(tmp_path)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(gguf_file, "_raw", fail)
    monkeypatch.setattr(weights.shutil, "copyfile", fail)
    with pytest.raises(raised if isinstance(raised, type) else type(raised)) as caught:
        pyprune.export(folder, tmp_path / name, profile, overwrite=True)
    if isinstance(caught.value, PyPruneError):
        assert caught.value.option == "output" and "disk is full" in str(caught.value)
    assert everything(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in", name])


def test_a_profile_that_cannot_hold_the_widths_writes_nothing(folder, tmp_path) -> None:
    for profile in ("uniform", "hetero-decilm"):
        with pytest.raises(PyPruneError, match=f"profile '{profile}'"):
            pyprune.export(folder, tmp_path / "out", profile)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_folder_without_one_of_its_weights_is_refused(folder, tmp_path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / gone)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / gone)
    with pytest.raises(PyPruneError, match=r"lacks the weight model\.norm\.weight"):
        pyprune.export(folder, tmp_path / "m.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("source", ["folder", "model"])
@pytest.mark.parametrize(("profile", "name"), [("hetero-hf", "out"), ("gguf", "out.gguf")])
def test_a_type_that_has_no_room_for_a_weight_is_refused(folder, tmp_path, profile, name, source) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    given = model if source == "model" else save(model, None, tmp_path / "large")
    before = everything(tmp_path)
    with pytest.raises(PyPruneError, match=r"dtype 'float16': has no room for 1 weights of .*down_proj.* Use bfloat16"):
        pyprune.export(given, tmp_path / name, profile, dtype="float16")
    assert everything(tmp_path) == before
    pyprune.export(given, tmp_path / name, profile, dtype="bfloat16")


def test_chat_templates_with_names_come_along(folder, tmp_path) -> None:
    tokenizer = x.bpe_tokenizer("{{ messages }}")
    templates = {"default": "{{ messages }}", "tool_use": "{{ messages }} with tools"}
    named = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=templates)
    save(load(folder), named, tmp_path / "named")
    out = pyprune.export(tmp_path / "named", tmp_path / "out", "hetero-hf")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).chat_template == templates
    other = pyprune.export(tmp_path / "named", tmp_path / "other", "hetero-hf", tokenizer=tokenizer)
    assert not (other / "additional_chat_templates").exists()  # they are of the tokenizer that was replaced

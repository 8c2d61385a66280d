"""What cannot be opened is said in one line that names it, and nothing half-loaded is returned."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import helpers_export as x
import helpers_surgery as h
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyprune
from pyprune.checkpoint import load, open_model, save
from pyprune.errors import PyPruneError
from pyprune.surgery import apply, gguf

REMOTE_CONFIGURATION = """
from transformers import PretrainedConfig


class OddConfig(PretrainedConfig):
    model_type = "odd_one"

    def __init__(self, width=16, thickness=24, vocab_size=128, num_hidden_layers=2, **options):
        self.width, self.thickness, self.vocab_size = width, thickness, vocab_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**options)
"""

REMOTE_MODEL = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .odd_configuration import OddConfig


class Block(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = torch.nn.Linear(config.width, config.thickness)
        self.down = torch.nn.Linear(config.thickness, config.width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class OddForCausalLM(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.width)
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head = torch.nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **options):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A sharded tiny Llama."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    return save(h.tiny("llama"), None, folder, max_shard_size="50KB")


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refused(path, pattern: str, **options) -> None:
    """Both ways in refuse ``path``, each under its own parameter's name."""
    for way, option in ((load, "folder"), (open_model, "model_name_or_path")):
        with pytest.raises(PyPruneError, match=pattern) as caught:
            way(path, **options)
        assert caught.value.option == option
        assert "\n" not in str(caught.value)


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def test_a_good_folder_opens_with_and_without_a_tokenizer(folder):
    model, tokenizer = open_model(folder)
    assert tokenizer is None and not model.training
    assert torch.equal(h.logits(model), h.logits(h.tiny("llama")))
    model, _ = open_model(str(folder), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16


def test_the_tokenizer_comes_along(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))).save_pretrained(folder)
    _, tokenizer = open_model(folder)
    assert tokenizer("b")["input_ids"] == [1]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no_such_folder", "a/b/c"])
def test_a_missing_path_is_named(name):
    with pytest.raises(PyPruneError, match="does not exist") as caught:
        open_model(name)
    assert caught.value.value == name
    with pytest.raises(PyPruneError, match="is not a folder"):
        load(name)


def test_a_name_that_the_hub_does_not_give_is_named():
    with pytest.raises(PyPruneError, match=r"(is neither a|is no) local folder"):  # by HF_HUB_OFFLINE
        open_model("nobody/no-such-model")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.txt").write_text("text")
    with pytest.raises(PyPruneError, match="is not a folder with a checkpoint"):
        open_model(tmp_path / "model.txt")


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_a_configuration_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json.*is not JSON")


def test_a_folder_without_weights(folder):
    for shard in folder.glob("model*"):
        shard.unlink()
    refused(folder, "has no weights")


def test_a_missing_shard_is_named(folder):
    name = first_shard(folder).name
    (folder / name).unlink()
    refused(folder, rf"1 of \d+ shards are missing: {name}")


def test_a_pickle_is_not_opened(folder):
    for shard in folder.glob("model*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even read")
    refused(folder, r"in a pickle only \(pytorch_model.bin\).*save_pretrained")


@pytest.mark.parametrize("length", [-1, 100, 4, 0])
def test_a_truncated_file_is_seen_before_loading(folder, length):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:length])
    refused(folder, f"{shard.name} is (cut short|not a whole safetensors file)")


def test_a_file_with_something_after_its_end(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"more")
    refused(folder, f"{shard.name}.*bytes where its header says")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(folder, f"{name} has 1 weights that are not finite")


def test_quantised_weights(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"quantised weights \(gptq\)")


def test_a_class_without_a_causal_head(tmp_path):
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)).save_pretrained(
        tmp_path
    )
    refused(tmp_path, "is a T5EncoderModel, which is no causal language model")


def test_a_checkpoint_whose_head_is_missing(folder):
    for shard in folder.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    refused(folder, r"no causal language-model head \(lm_head.weight is missing\)")


def test_a_checkpoint_with_a_missing_tensor(folder):
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = sorted(n for n in tensors if n != "lm_head.weight")[0]
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(folder, f"lacks 1 of the model's weights, among them {name}")


def test_weights_of_other_shapes_than_the_configuration_says(folder):
    change_config(folder, intermediate_size=41)
    refused(folder, "other shapes than its config.json says")


def test_a_model_type_that_is_not_known(folder):
    change_config(folder, model_type="llama_of_the_future")
    refused(folder, "model type that the installed transformers does not know")


def test_sizes_that_the_class_refuses(folder):
    change_config(folder, num_attention_heads=7)
    refused(folder, "cannot be opened")


@pytest.fixture
def remote(tmp_path) -> Path:
    """A checkpoint that brings its own modelling code."""
    folder = tmp_path / "odd_checkpoint"
    folder.mkdir()
    (folder / "odd_configuration.py").write_text(REMOTE_CONFIGURATION)
    (folder / "odd_model.py").write_text(REMOTE_MODEL)
    auto_map = {"AutoConfig": "odd_configuration.OddConfig", "AutoModelForCausalLM": "odd_model.OddForCausalLM"}
    config = {"model_type": "odd_one", "auto_map": auto_map, "architectures": ["OddForCausalLM"]}
    sizes = {"width": 16, "thickness": 24, "vocab_size": 128, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    tensors = {"embed.weight": torch.randn(128, 16), "head.weight": torch.randn(128, 16)}
    for i in range(2):
        tensors[f"blocks.{i}.up.weight"], tensors[f"blocks.{i}.up.bias"] = torch.randn(24, 16), torch.randn(24)
        tensors[f"blocks.{i}.down.weight"], tensors[f"blocks.{i}.down.bias"] = torch.randn(16, 24), torch.randn(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_that_comes_with_a_checkpoint_runs_only_when_allowed(remote):
    refused(remote, "needs modelling code that comes with it.*trust_remote_code")
    assert type(load(remote, trust_remote_code=True)).__name__ == "OddForCausalLM"


def test_code_that_is_missing_or_broken_is_named(remote):
    (remote / "odd_model.py").write_text("import nothing_of_this_name")
    refused(remote, "cannot be opened.*nothing_of_this_name", trust_remote_code=True)
    (remote / "odd_model.py").unlink()
    refused(remote, r"cannot be opened.*odd_model\.py", trust_remote_code=True)


@pytest.mark.parametrize("widths", [(9, 9), (9, 15)], ids=["uniform", "per layer"])
def test_a_class_that_nobody_has_seen_is_pruned_saved_and_opened_again(remote, tmp_path, widths):
    model = load(remote, trust_remote_code=True)
    cuts = []
    for i, width in enumerate(widths):
        members = [h._member(f"blocks.{i}.up.{n}", 0, 24) for n in ("weight", "bias")]
        members.append(h._member(f"blocks.{i}.down.weight", 1, 24))
        cuts.append(h.cut(h.Group(f"blocks.{i}:ffn", "ffn", f"blocks.{i}", i, 24, tuple(members)), width))
    small = apply(model, h.Plan(tuple(cuts)))
    assert [block.up.out_features for block in small.blocks] == list(widths)
    save(small, None, tmp_path / "small")
    assert {"odd_configuration.py", "odd_model.py"} <= {f.name for f in (tmp_path / "small").iterdir()}
    loaded = load(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(h.logits(loaded), h.logits(small))
    if len(set(widths)) == 1:
        from transformers import AutoModelForCausalLM

        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
        assert torch.equal(h.logits(stock), h.logits(small))


def write_gguf(path: Path) -> None:
    """A Llama of 2 layers in a GGUF file, one matrix quantised."""
    import gguf as format
    import numpy as np

    writer = format.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 128, "rope.dimension_count": 16,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (128, 64), "output.weight": (128, 64), "output_norm.weight": (64,)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
            "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = shape
    for name, shape in shapes.items():
        array = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if name == "blk.0.ffn_up.weight":
            kind = format.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, format.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_from_a_gguf_file_is_pruned_and_saved_in_full_precision(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    model, tokenizer = open_model(tmp_path / "model.gguf")
    marked = find_spec("transformers.quantizers.quantizer_gguf") is not None  # by newer ones, which then refuse to save
    assert tokenizer is None and gguf.is_from_gguf(model) == marked
    with pytest.warns(UserWarning, match="GGUF") if marked else nullcontext():
        save(model, None, tmp_path / "dense")
    model, _ = open_model(tmp_path / "model.gguf")
    groups = h.llama_like(model)
    small = apply(model, h.uniform_plan(groups, kv_heads=1, ffn=50))
    save(small, None, tmp_path / "small")
    assert torch.equal(h.logits(load(tmp_path / "small")), h.logits(small))
    assert "quantization_config" not in json.loads((tmp_path / "small/config.json").read_text())


def test_the_decoder_of_a_model_with_several_towers_opens_alone(tmp_path):
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Emu3ForCausalLM(Emu3TextConfig(**sizes, num_key_value_heads=2, vocab_size=128, pad_token_id=0)).eval()
    save(model, None, tmp_path / "saved")
    assert torch.equal(h.logits(load(tmp_path / "saved")), h.logits(model))


def test_code_that_comes_with_a_model_is_that_of_the_revision(monkeypatch) -> None:
    import transformers
    from transformers import dynamic_module_utils

    class Asked(Exception):
        pass

    def code(*given, **more):
        raise Asked(given, more)

    config = transformers.PretrainedConfig()
    config.auto_map = {"AutoModelForCausalLM": "modeling.Odd"}
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", code)
    with pytest.raises(PyPruneError) as asked:
        open_model("owner/odd", trust_remote_code=True, revision="abc")
    assert isinstance(asked.value.__cause__, Asked)
    assert asked.value.__cause__.args == (("modeling.Odd", "owner/odd"), {"revision": "abc"})


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_of_weights_that_says_something_else_is_named(tmp_path, text):
    save(h.tiny("llama"), None, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PyPruneError, match=r"model\.safetensors\.index\.json.*which file holds which weight"):
        load(tmp_path / "m")


def test_a_gguf_file_that_transformers_cannot_read_is_named_with_the_way_out(tmp_path):
    uneven = tmp_path / "model.gguf"
    pyprune.export(x.made(), uneven, "gguf")
    with pytest.raises(PyPruneError, match=rf"'{uneven}': has layers of different widths .* Name the folder"):
        open_model(uneven)
    (tmp_path / "bad.gguf").write_bytes(b"something else")
    with pytest.raises(PyPruneError, match=rf"'{tmp_path / 'bad.gguf'}': cannot be opened"):
        open_model(tmp_path / "bad.gguf")

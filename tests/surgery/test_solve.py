"""Configuration values are found by trying, without knowing names."""

from __future__ import annotations

import copy

import helpers_surgery as h
import pytest
import torch
from helpers_families import build
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.surgery import apply, check
from pyprune.surgery.attributes import Attribute, Scope, candidates, with_values
from pyprune.surgery.decoder import layers_path, structure


class PlainConfig(PretrainedConfig):
    """Names that no other model uses; widths in a list and in a nested dictionary."""

    model_type = "plain_test_model"

    def __init__(
        self,
        breadth=24,
        lanes=4,
        lane_size=6,
        factor=3,
        stages=(20, 20, 20),
        extra=None,
        vocab_size=128,
        tall=3,
        **options,
    ):
        self.breadth, self.lanes, self.lane_size, self.factor = breadth, lanes, lane_size, factor
        self.stages, self.extra, self.vocab_size, self.num_hidden_layers = list(stages), extra, vocab_size, tall
        self.extra = extra or {"inner": 10}
        super().__init__(**options)


class Mixer(nn.Module):
    """Attention whose heads are called lanes; the width of one is used in ``forward`` only."""

    def __init__(self, config):
        super().__init__()
        self.lanes = config.lanes
        self.into = nn.Linear(config.breadth, 3 * config.lanes * config.lane_size)
        self.out = nn.Linear(config.lanes * config.lane_size, config.breadth)

    def forward(self, x):
        q, k, v = self.into(x).view(*x.shape[:-1], 3, self.lanes, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Stage(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.mixer = Mixer(config)
        self.wide = nn.Linear(config.breadth, config.stages[i])
        self.back = nn.Linear(config.stages[i], config.breadth)
        self.side_in = nn.Linear(config.breadth, 2 * config.extra["inner"])
        self.side_out = nn.Linear(config.extra["inner"], config.breadth)
        self.multiple = nn.Linear(config.breadth, 4 * config.factor)
        self.multiple_back = nn.Linear(4 * config.factor, config.breadth)

    def forward(self, x):
        x = x + self.mixer(x)
        x = x + self.back(torch.relu(self.wide(x)))
        gate, up = self.side_in(x).chunk(2, -1)
        x = x + self.side_out(torch.sigmoid(gate) * up)
        return x + self.multiple_back(torch.relu(self.multiple(x)))


class PlainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.read = nn.Embedding(config.vocab_size, config.breadth)
        self.tower = nn.ModuleList(Stage(config, i) for i in range(config.num_hidden_layers))
        self.write = nn.Linear(config.breadth, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **options):
        x = self.read(input_ids)
        for stage in self.tower:
            x = stage(x)
        return CausalLMOutput(logits=self.write(x))


@pytest.fixture
def plain() -> PlainForCausalLM:
    torch.manual_seed(0)
    return PlainForCausalLM(PlainConfig()).eval()


def groups(model, layer: int) -> dict[str, h.Group]:
    at = f"tower.{layer}"
    lanes, size = model.config.lanes, model.config.lane_size
    inner = lanes * size
    heads = tuple(h.Lattice(part * inner, 0, size, ((size, 1),)) for part in range(3))
    pair = (h.Lattice(0, 0, 1), h.Lattice(10, 0, 1))
    block = h.Lattice(0, 0, 4, ((4, 1),))

    def group(role: str, units: int, *members: tuple[str, int, tuple[h.Lattice, ...]]) -> h.Group:
        made = tuple(h._member(f"{at}.{name}", dim, units, *lattices) for name, dim, lattices in members)
        return h.Group(f"{at}.{members[0][0]}:{role}", role, at, layer, units, made)

    one = (h.Lattice(0, 0, 1),)
    return {
        "lanes": group(
            "kv_heads", lanes, ("mixer.into.weight", 0, heads), ("mixer.into.bias", 0, heads),
            ("mixer.out.weight", 1, (h.Lattice(0, 0, size, ((size, 1),)),)),
        ),
        "wide": group("ffn", 20, ("wide.weight", 0, one), ("wide.bias", 0, one), ("back.weight", 1, one)),
        "side": group("ffn", 10, ("side_in.weight", 0, pair), ("side_in.bias", 0, pair), ("side_out.weight", 1, one)),
        "multiple": group(
            "ffn", 3, ("multiple.weight", 0, (block,)), ("multiple.bias", 0, (block,)),
            ("multiple_back.weight", 1, (block,)),
        ),
    }  # fmt: skip


def checked(model, plan):
    masked = copy.deepcopy(model)
    h.mask_(masked, plan)
    small = apply(model, plan, verify=False)
    assert (h.logits(small) - h.logits(masked)).abs().max() <= 1e-4
    return small


def test_unfamiliar_names_are_solved(plain):
    cuts = [h.cut(groups(plain, i)["lanes"], 3) for i in range(3)]
    config = checked(plain, h.Plan(tuple(cuts))).config
    assert (config.lanes, config.lane_size) == (3, 6)  # not 4 lanes of 4.5, nor narrower ones


def test_a_list_with_one_width_a_layer_takes_per_layer_widths(plain):
    cuts = [h.cut(groups(plain, i)["wide"], 20 - 3 * i) for i in range(1, 3)]
    small = checked(plain, h.Plan(tuple(cuts)))
    assert small.config.stages == [20, 17, 14] and not small.config.is_heterogeneous
    assert plain.config.stages == [20, 20, 20]


def test_a_width_in_a_nested_part_is_found(plain):
    cuts = [h.cut(groups(plain, i)["side"], 7) for i in range(3)]
    assert checked(plain, h.Plan(tuple(cuts))).config.extra == {"inner": 7}
    assert plain.config.extra == {"inner": 10}


def test_a_width_in_a_nested_part_can_differ_between_layers(plain):
    cuts = [h.cut(groups(plain, i)["side"], 7 - i) for i in range(3)]
    small = checked(plain, h.Plan(tuple(cuts)))
    assert [stage.side_out.in_features for stage in small.tower] == [7, 6, 5]


def test_an_attribute_that_a_multiple_of_gives_the_width_is_found(plain):
    cuts = [h.cut(groups(plain, i)["multiple"], 2) for i in range(3)]
    assert checked(plain, h.Plan(tuple(cuts))).config.factor == 2


def test_several_widths_of_one_role_are_solved_together(plain):
    cuts = [h.cut(groups(plain, i)[name], width) for i in range(3) for name, width in (("side", 4), ("wide", 9))]
    config = checked(plain, h.Plan(tuple(cuts))).config
    assert config.stages == [9, 9, 9] and config.extra == {"inner": 4}


def test_fewer_heads_are_never_the_same_heads_made_narrower():
    model = h.tiny("gpt2", scale_attn_weights=False)  # no scale in the module tells them apart
    config = apply(model, h.uniform(model)).config
    assert (config.n_head, config.head_dim) == (3, 8)


def test_a_count_that_shapes_no_tensor_shrinks_with_the_one_it_divides():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**h.COMMON, **sizes, **latent, **heads)).eval()
    plan = h.Plan(tuple(h.cut(g, 2) for g in discover(model) if g.role == "kv_heads"))
    assert len(plan.cuts) == 2
    small = checked(model, plan)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 2)
    assert small.model.layers[0].self_attn.num_key_value_groups == 1


def test_widths_that_a_kernel_refuses_are_named_as_the_cause():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**h.HEADS, "num_local_experts": 4, "num_hidden_layers": 1}
    model = MixtralForCausalLM(MixtralConfig(**h.COMMON, **sizes)).eval()
    groups = [g for g in discover(model) if g.role == "expert_ffn"]
    with pytest.raises(PyPruneError, match=r"does not run with these widths.*round_to=8"):
        apply(model, h.Plan(tuple(h.cut(g, 10) for g in groups)))


def test_a_model_that_does_not_run_is_an_error_also_where_nothing_can_be_compared(tmp_path):
    """A query latent of 7 in DeepSeek-V2: the norm over it makes the cut inexact."""
    model = build("DeepSeek-V2", tmp_path)
    groups = [g for g in discover(model) if g.role == "latent" and g.units == 14]
    plan = h.Plan(tuple(h.cut(g, 7) for g in groups))
    assert plan.cuts and not any(g.exact for g in groups)
    with pytest.raises(PyPruneError, match="does not run with these widths"):
        apply(model, plan)


def test_layers_are_the_module_list_with_the_most_parameters():
    assert layers_path(h.tiny("llama")) == "model.layers"
    assert layers_path(h.tiny("gpt2")) == "transformer.h"
    assert layers_path(nn.Linear(2, 2)) is None


def test_attributes_read_and_write_nested_places_without_touching_the_original(plain):
    inner, second = Attribute("extra.inner"), Attribute("stages", 1)
    changed = with_values(plain.config, {inner: 3, second: 5})
    assert (inner.get(changed), second.get(changed)) == (3, 5)
    assert (inner.get(plain.config), second.get(plain.config)) == (10, 20)
    assert {inner, second} <= set(candidates(plain.config, 1))
    assert second not in candidates(plain.config)


def test_a_refused_value_is_an_answer():
    def construct(config):
        if config.intermediate_size == 7:
            raise KeyError("seven")
        with torch.device("meta"):
            return nn.Linear(2, config.intermediate_size)

    scope = Scope(h.tiny("llama").config, construct)
    assert scope.build({Attribute("intermediate_size"): 7}) is None
    assert scope.moves({}, Attribute("intermediate_size"), 40) == {("weight", 0): 1.0, ("bias", 0): 1.0}
    assert structure(nn.Linear(2, 3)) == {"weight": (3, 2), "bias": (3,)}


def test_a_vocabulary_masked_by_infinities_is_no_reason_not_to_compare(plain):
    masked = check.logits(plain)
    masked[..., 3] = -torch.inf
    check.compare(masked, plain, torch.float32)
    masked[..., 5] += 1
    with pytest.raises(PyPruneError, match="the smaller model is not the old one"):
        check.compare(masked, plain, torch.float32)

"""``discover`` as a function: inputs it takes, how it leaves the model, what it refuses and what it says."""

from __future__ import annotations

import json
import time

import pytest
import torch
from helpers_discovery import logits, tensors_of, tiny
from torch import nn

from pyprune.discovery import Groups, discover
from pyprune.discovery.rules import RULES, rule
from pyprune.errors import PyPruneError


class Mlp(nn.Module):
    def __init__(self, middle=nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(6, 10), middle, nn.Linear(10, 4)

    def forward(self, x):
        return self.down(self.middle(torch.relu(self.up(x))))


class Lambda(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def only(groups, role):
    (group,) = [g for g in groups if g.role == role]
    return group


def state(model):
    return {
        "modules": {n: (id(m), m.training, dict(m.__dict__)) for n, m in model.named_modules()},
        "hooks": [list(m._forward_hooks.values()) for m in model.modules()],
        "tensors": {n: (id(t), t._version, t.requires_grad) for n, t in tensors_of(model).items()},
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_left_exactly_as_it_was(family):
    model = tiny(family).train()
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    before, values = state(model), {n: t.clone() for n, t in tensors_of(model).items()}
    discover(model)
    assert state(model) == before
    assert not calls, "a user's hook saw the traced run"
    assert all(torch.equal(t, values[n]) for n, t in tensors_of(model).items())
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=torch.tensor([[3, 4]]))
    assert calls == [1]


def test_the_model_is_left_as_it_was_when_the_run_fails():
    model = tiny("llama").train()
    before = state(model)
    with pytest.raises(PyPruneError, match="cannot run on inputs of shape"):
        discover(model, {"input_ids": torch.zeros(2, 3, 4, 5, dtype=torch.long)})
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_the_meta_device_gives_the_same_groups(family):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert next(empty.parameters()).is_meta
    assert discover(empty).to_dict() == discover(model).to_dict()


def test_half_precision_gives_the_same_groups():
    assert discover(tiny("llama").bfloat16()).to_dict() == discover(tiny("llama")).to_dict()


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_torch_compile_wrappers_are_looked_through(wrap):
    expected = discover(tiny("llama")).to_dict()
    assert discover(wrap(tiny("llama"))).to_dict() == expected


def test_offloading_hooks_that_replace_forward_are_stepped_around():
    model = tiny("llama")
    expected = discover(model).to_dict()

    def offloading(*args, **kwargs):
        raise RuntimeError("weights are on disk")

    module = model.model.layers[0].mlp
    module._old_forward, module.forward = module.forward, offloading
    assert discover(model).to_dict() == expected
    assert module.forward is offloading


def test_example_inputs_may_be_a_dict_a_tuple_or_a_tensor():
    model = tiny("llama")
    ids = torch.randint(0, 100, (2, 5))
    expected = discover(model).to_dict()
    assert discover(model, {"input_ids": ids, "use_cache": False}).to_dict() == expected
    assert discover(model, (ids,)).to_dict() == expected
    assert discover(model, ids).to_dict() == expected


def test_padded_inputs_and_a_cache_give_the_same_groups():
    model = tiny("mistral", "eager")
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    inputs = {"input_ids": torch.randint(0, 100, (2, 6)), "attention_mask": mask, "use_cache": False}
    assert discover(model, inputs).to_dict() == discover(model).to_dict()
    with_cache = discover(model, inputs | {"use_cache": True})
    assert [g.name for g in with_cache] == [g.name for g in discover(model)]


def test_data_dimensions_of_the_same_size_as_weight_dimensions_confuse_nothing():
    model = tiny("llama")
    expected = discover(model).to_dict()
    for batch, length in [(3, 3), (6, 8), (2, 48), (1, 1), (8, 6)]:
        assert discover(model, torch.zeros(batch, length, dtype=torch.long)).to_dict() == expected


def test_a_plain_module_needs_example_inputs():
    with pytest.raises(PyPruneError, match="example_inputs: Mlp does not take input_ids"):
        discover(Mlp())
    group = only(discover(Mlp(), torch.zeros(5, 6)), "ffn")
    assert {(m.tensor, m.dim) for m in group.members} == {("up.weight", 0), ("up.bias", 0), ("down.weight", 1)}


def test_dimensions_of_inputs_and_outputs_are_frozen_with_the_reason():
    groups = discover(Mlp(), torch.zeros(5, 6))
    reasons = {g.members[0].tensor: g.frozen for g in groups if g.frozen}
    assert reasons == {
        "up.weight": "up.weight: is a dimension of the model's input",
        "down.weight": "down.weight: is a dimension of the model's output",
    }


def test_inputs_of_another_kind_are_refused():
    with pytest.raises(PyPruneError, match="example_inputs 'str': is not a tensor"):
        discover(Mlp(), "text")
    with pytest.raises(PyPruneError, match=r"is not a torch\.nn\.Module"):
        discover({"a": 1})


def test_quantised_weights_are_refused_by_name():
    model = Mlp()
    model.up.weight = nn.Parameter(torch.zeros(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PyPruneError, match=r"quantised weights \(up.weight is torch.int8\)"):
        discover(model, torch.zeros(5, 6))


def test_an_op_without_a_rule_freezes_what_it_touches_and_says_so_once():
    saved = RULES.pop("cumsum")
    try:
        groups = discover(Mlp(Lambda(lambda x: torch.cumsum(torch.cumsum(x, -1), -1))), torch.zeros(5, 6))
    finally:
        RULES["cumsum"] = saved
    group = next(g for g in groups if g.units == 10)
    assert not group.prunable
    assert group.frozen == "up.weight: no rule for it: frozen by aten.cumsum in middle"
    (warning,) = groups.warnings
    assert "aten.cumsum" in warning and "middle" in warning and "up.weight" in warning


def test_two_rules_for_an_op_are_refused():
    with pytest.raises(ValueError, match="two rules for mm"):
        rule("mm")(lambda call: None)


def write_through_a_slice(x):
    view = x.view(1, 5, -1)
    view[:, :3] = 1.0
    return x * view.sum(-1).view(5, 1)


def write_the_base(x):
    view = x.view(1, 5, -1)
    x.add_(1.0)
    return x * view.sum(-1).view(5, 1)


def write_the_base_then_a_view(x):
    view = x.view(1, 5, -1)
    x.mul_(2.0)
    view.add_(1.0)
    return x * x.sum(-1, keepdim=True)


def write_a_detached_tensor(x):
    x.detach().add_(1.0)
    return x * x.sum(-1, keepdim=True)


def scale_a_view(x):
    view = x.view(1, 5, -1)
    view.mul_(2.0)
    return x * view.sum(-1).view(5, 1)


def of_norm(order):
    return lambda x: x * torch.linalg.vector_norm(x, ord=order, dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "f", "exact"),
    [
        ("softmax", lambda x: torch.softmax(x, -1), False),
        ("mean", lambda x: x - x.mean(-1, keepdim=True), False),
        ("layer norm", lambda x: nn.functional.layer_norm(x, (10,)), False),
        ("sum of squares", lambda x: x * x.square().sum(-1, keepdim=True), True),
        ("sum of exponentials", lambda x: x * torch.exp(x).sum(-1, keepdim=True), False),
        ("scalar offset", lambda x: x + 1, True),
        ("product with itself", lambda x: x * (x @ x.T).sum(), True),
        ("shifted product", lambda x: x * ((x + 1) @ (x + 1).T).sum(), False),
        ("write through a slice of a view", write_through_a_slice, False),
        ("write to a base that has a view", write_the_base, False),
        ("write to a view after one to its base", write_the_base_then_a_view, False),
        ("write through a detached tensor", write_a_detached_tensor, False),
        ("scaled view", scale_a_view, True),
        ("length", of_norm(2), True),
        ("smallest magnitude", of_norm(-torch.inf), False),
        ("norm of negative order", of_norm(-1), False),
        ("sum of values clipped around zero", lambda x: x * nn.functional.hardtanh(x, 0.0, 4.0).sum(-1, True), True),
        ("sum of values clipped above zero", lambda x: x * nn.functional.hardtanh(x, 0.2, 4.0).sum(-1, True), False),
        ("sum of quotients that are not numbers", lambda x: x * (x / x).sum(-1, True), False),
        ("replaced quotients", lambda x: x * torch.nan_to_num(x / x, nan=1.5).sum(-1, True), False),
        ("quotients replaced by zero", lambda x: x * torch.nan_to_num(x / (x + 1)).sum(-1, True), True),
    ],
)
def test_exact_means_that_slicing_equals_masking(name, f, exact):
    torch.manual_seed(3)
    model = Mlp(Lambda(f))
    # No channel that is kept is zero by itself.
    nn.init.constant_(model.up.bias, 3.0)
    x = torch.randn(5, 6)
    group = next(g for g in discover(model, x) if g.units == 10)
    assert group.prunable and group.exact == exact, name
    zeroed, small = Mlp(Lambda(f)), Mlp(Lambda(f))
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p, dim in ((zeroed.up.weight, 0), (zeroed.up.bias, 0), (zeroed.down.weight, 1)):
            p.narrow(dim, 5, 5).zero_()
        small.up.weight, small.up.bias = (nn.Parameter(t[:5].clone()) for t in (model.up.weight, model.up.bias))
        small.down.weight, small.down.bias = nn.Parameter(model.down.weight[:, :5].clone()), model.down.bias
    if name == "layer norm":
        small.middle = Lambda(lambda x: nn.functional.layer_norm(x, (5,)))
    assert torch.allclose(zeroed(x), small(x), atol=1e-5) == exact, name


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x + torch.arange(10.0),
        lambda x: x.flip(-1),
        lambda x: x[:, torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 9, 8])],
        lambda x: x.sort(-1)[0],
        lambda x: nn.functional.pad(x.topk(4)[0], (0, 6)),
        lambda x: x * torch.tensor([0.5] * 10),
    ],
)
def test_channels_told_apart_by_position_are_not_prunable(f):
    groups = discover(Mlp(Lambda(f)), torch.zeros(5, 6))
    assert not [g for g in groups if g.prunable and any(m.tensor.startswith(("up", "down")) for m in g.members)]


def test_concatenated_branches_are_separate_groups():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(12, 5)

        def forward(self, x):
            return self.out(torch.relu(torch.cat([self.a(x), self.b(x)], -1)))

    groups = discover(Branches(), torch.zeros(3, 6))
    second = next(g for g in groups if g.units == 8)
    (read,) = [m for m in second.members if m.tensor == "out.weight"]
    assert read.index.positions()[0, :, 0].tolist() == list(range(4, 12))


def test_a_small_convolutional_network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, bias=False),
        nn.Flatten(), nn.Linear(6 * 2 * 2, 5),
    )  # fmt: skip
    groups = discover(net, torch.zeros(2, 3, 8, 8))
    batch = next(g for g in groups if g.units == 8)
    assert {m.tensor for m in batch.members} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "4.weight"
    }  # fmt: skip
    assert batch.prunable
    flat = next(g for g in groups if g.units == 6 and g.prunable)
    (read,) = [m for m in flat.members if m.tensor == "6.weight"]
    assert read.index.positions()[0, 1].tolist() == [4, 5, 6, 7]


def test_parameters_that_the_inputs_do_not_reach_protect_their_neighbours():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 10)
            self.never, self.out = nn.Linear(10, 10), nn.Linear(10, 3)

        def forward(self, x):
            x = self.second(torch.relu(self.first(x)))
            return self.out(x if len(x) < 100 else self.never(x))

    groups = discover(Routed(), torch.zeros(5, 6))
    assert not groups.prunable()
    assert any("never.weight" in (g.frozen or "") for g in groups)


def test_an_op_that_needs_values_is_traced_on_real_tensors():
    def busiest(x):
        return x[x.sum(-1) > x.sum(-1).min().item()]

    groups = discover(Mlp(Lambda(busiest)), torch.randn(5, 6))
    assert only(groups, "ffn").prunable
    with pytest.raises(PyPruneError, match="depends on values"):
        discover(Mlp(Lambda(busiest)).to("meta"), torch.randn(5, 6))


def test_a_module_used_twice_is_one_member_set():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a
            self.mlp = Mlp()

        def forward(self, x):
            return self.mlp(self.b(torch.relu(self.a(x))))

    groups = discover(Shared(), torch.zeros(5, 6))
    assert groups.tied == {"b.weight": "a.weight", "b.bias": "a.bias"}
    assert "b.weight" not in groups.shapes
    assert groups.num_parameters() == sum(p.numel() for p in Shared().parameters())


def test_groups_survive_json():
    groups = discover(tiny("gpt2"))
    again = Groups.from_dict(json.loads(json.dumps(groups.to_dict())))
    assert again == groups
    assert again["transformer.h.0.attn:vo_dim"].within == "transformer.h.0.attn:kv_heads"


def test_the_table_names_roles_units_and_reasons():
    model = tiny("llama")
    groups = discover(model)
    rows = {r["name"]: r for r in groups.table()}
    assert rows["model.layers.0.mlp:ffn"]["parameters_per_unit"] == 3 * 48
    assert rows["model.layers:layers"]["parameters_per_unit"] == sum(
        p.numel() for p in model.model.layers[0].parameters()
    )
    text = str(groups)
    assert text.count("\n") + 1 == 1 + 9
    line = next(x for x in text.splitlines() if x.startswith("query_heads"))
    assert "model.layers.0.self_attn .. model.layers.1.self_attn" in line and "3 x 2" in line
    assert "frozen: lm_head.weight: is a dimension of the model's output" in text
    assert groups.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_traced_run_predicts_nothing_about_the_weights():
    model = tiny("llama")
    before = logits(model)
    discover(model)
    assert torch.equal(logits(model), before)


def test_a_model_the_size_of_seven_billion_takes_seconds():
    from transformers import AutoModelForCausalLM, LlamaConfig

    def seconds(layers):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
                             num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        start = time.process_time()
        groups = discover(model)
        assert len(groups) == 5 + 4 * layers
        return time.process_time() - start

    seconds(2)
    small, large = (min(seconds(layers) for _ in range(3)) for layers in (8, 32))  # other tests' garbage is collected
    assert large < 8 * small, "cost must be linear in layers"
    assert large < 20

"""How gradients are made and consumed: batches, blocks, memory, the model's state, precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers_llama import llama_groups, tiny_llama
from torch import Tensor, nn

from pyprune.discovery.groups import Group, Groups, IndexMap, Lattice, Member
from pyprune.errors import PyPruneError
from pyprune.importance import Scores, score
from pyprune.importance import scoring as stage
from pyprune.importance.blocks import NotSweepable
from pyprune.importance.collector import Collector
from pyprune.importance.registry import get_criterion

GRADIENT = ("vectorize", "param_first", "param_second", "param_mix")
ROLES = (["kv_heads", "ffn"], ["hidden"])  # of linear layers in blocks only; of norms, embedding and head as well


@pytest.fixture(autouse=True)
def _batches_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """These batches are so small that they would all be joined into one."""
    monkeypatch.setattr(stage, "STEP_TOKENS", 0)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 97, (6, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def groups(model: nn.Module) -> Groups:
    return llama_groups(model.config, model)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that forbids the block sweep."""

    def refuse(*args: Any) -> None:
        raise NotSweepable("the test says so")

    return lambda: monkeypatch.setattr(stage, "plan_sweep", refuse)


def assert_close(a: Scores, b: Scores, tolerance: float = 2e-5) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance * float(b[name].max())), name


class LiveGradients:
    """The most bytes that gradients, their sums and squares ever took at once, looked at whenever one arrives."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = self.arrivals = 0
        self.parameters = list(model.parameters())
        monkeypatch.setattr(stage, "_without_hooks", nullcontext)
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(lambda _: self.look())
        for name in ("add", "finish"):
            monkeypatch.setattr(Collector, name, self.watched(getattr(Collector, name)))

    def watched(self, method: Any) -> Any:
        def call(collector: Collector, *args: Any) -> None:
            if method.__name__ == "add":
                method(collector, *args)
            self.look(*collector._gradients.values(), *collector._curvatures.values())
            if method.__name__ == "finish":
                method(collector, *args)

        return call

    def look(self, *sums: Tensor) -> None:
        self.arrivals += 1
        self.most = max(
            self.most, sum(t.nbytes for t in sums) + sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        )


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("criterion", GRADIENT)
def test_batches_do_not_change_the_scores(
    model: nn.Module, groups: Groups, ids: Tensor, criterion: str, roles: list[str]
) -> None:
    one = score(model, groups, ids.split(6), criterion, roles=roles)
    for size in (1, 2, 4):
        assert_close(score(model, groups, ids.split(size), criterion, roles=roles), one)
    assert one.details["engine"] == "block sweep"


@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("criterion", GRADIENT)
def test_the_block_sweep_gives_what_whole_backward_passes_give(
    model: nn.Module, groups: Groups, ids: Tensor, whole: Any, criterion: str, size: int, roles: list[str]
) -> None:
    swept = score(model, groups, ids.split(size), criterion, roles=roles)
    whole()
    plain = score(model, groups, ids.split(size), criterion, roles=roles)
    assert swept.details["engine"] == "block sweep"
    assert plain.details["engine"] == "whole backward passes: the test says so"
    assert_close(swept, plain)
    assert abs(swept.details["loss"] - plain.details["loss"]) < 1e-6


@pytest.mark.parametrize("criterion", GRADIENT)
def test_tied_embeddings_get_the_gradient_of_both_uses(ids: Tensor, whole: Any, criterion: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    groups = llama_groups(model.config, model)
    swept = score(model, groups, ids.split(2), criterion, roles=["hidden"])
    whole()
    assert_close(swept, score(model, groups, ids.split(2), criterion, roles=["hidden"]))


def test_a_tensor_listed_under_two_names_counts_once(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    group = groups["model.layers.0.mlp:ffn"]
    twice = Group(**{**group.__dict__, "members": (*group.members, group.members[0])})
    doubled = Groups([twice], groups.shapes, groups.parameters)
    once = score(model, groups, ids, roles=["ffn"], layers=[0])
    assert torch.equal(score(model, doubled, ids)[group.name], once[group.name])


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("criterion", GRADIENT)
def test_a_calibration_whose_streams_outweigh_the_gradients_is_swept_in_parts(
    model: nn.Module, groups: Groups, ids: Tensor, criterion: str, roles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_sweep = score(model, groups, ids.split(2), criterion, roles=roles)
    monkeypatch.setattr(stage, "STREAM_BYTES", 0)
    live = LiveGradients(model, monkeypatch)
    parts = score(model, groups, ids.split(2) * 4, criterion, roles=roles)
    assert_close(parts, whole_sweep)
    adds_up = criterion in ("vectorize", "param_second")
    assert parts.details["engine"] == ("block sweep" if adds_up else "block sweep, gradients kept")
    scored = sum(groups.numel(n) * 4 for n in {m.tensor for g in groups.prunable(roles) for m in g.members})
    assert (live.most < scored) == adds_up or roles == ["hidden"]


def _passes(model: nn.Module) -> list[list[int]]:
    """The shapes of the inputs that go into the first block from now on."""
    seen: list[list[int]] = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda m, args, out: seen.append(list(args[0].shape)))
    return seen


def test_small_batches_are_joined_as_long_as_they_are_alike(
    model: nn.Module, groups: Groups, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [ids[:1], ids[1:2], ids[2:4], ids[4:5, :6], ids[5:6]]
    apart = score(model, groups, batches)
    monkeypatch.setattr(stage, "STEP_TOKENS", 30)
    seen = _passes(model)
    assert_close(score(model, groups, batches, activation_memory=1000), apart)
    assert [s[:2] for s in seen if s[1] != 8] == [[2, 10], [2, 10], [1, 6], [1, 10]]


@pytest.mark.parametrize(("criterion", "rows"), [("param_second", [2, 2, 2]), ("param_first", [3, 3])])
def test_criteria_that_add_up_over_batches_take_smaller_steps_on_the_cpu(
    model: nn.Module, groups: Groups, ids: Tensor, monkeypatch: pytest.MonkeyPatch, criterion: str, rows: list[int]
) -> None:
    options: Any = {"criterion": criterion, "roles": ["kv_heads", "ffn"], "activation_memory": 1000}
    apart = score(model, groups, ids.split(1), **options)
    monkeypatch.setattr(stage, "STEP_TOKENS", 30)
    monkeypatch.setattr(stage, "ADDED_TOKENS", 20)
    seen = _passes(model)
    assert_close(score(model, groups, ids.split(1), **options), apart)
    assert [s[0] for s in seen if s[1] != 8] == rows


@pytest.mark.parametrize("criterion", ["param_second", "param_mix"])
def test_curvatures_of_linear_layers_need_no_pass_for_each_sample(
    model: nn.Module, groups: Groups, ids: Tensor, criterion: str
) -> None:
    seen = _passes(model)
    score(model, groups, ids.split(3), criterion, roles=["kv_heads", "ffn"], activation_memory=1000)
    assert [s[0] for s in seen if s[1] != 8] == [3, 3]
    seen.clear()
    score(model, groups, ids.split(3), criterion, roles=["hidden"], activation_memory=1000)
    assert [s[0] for s in seen if s[1] != 8] == [1] * 6


@pytest.mark.parametrize("criterion", ["param_second", "param_mix"])
def test_linear_layers_that_see_no_samples_get_a_pass_for_each(ids: Tensor, criterion: str) -> None:
    """As in a mixture of experts, which flattens batch and length."""

    class Flat(Block):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, None]:
            out, _ = super().forward(x.flatten(0, 1), extra)
            return out.view_as(x), None

    torch.manual_seed(5)
    net = Skipping(around=False)
    flat = copy.deepcopy(net)
    for block in flat.blocks:
        block.__class__ = Flat
    groups = _channels(net, {"blocks.0.up.weight": 0, "blocks.0.up.bias": 0, "blocks.1.down.weight": 1})
    assert_close(
        score(flat, groups, (ids % 13).split(3), criterion), score(net, groups, (ids % 13).split(3), criterion)
    )


@pytest.mark.parametrize("activation_memory", [0, 1e-3, 0.05, 1000])
def test_kept_and_recomputed_activations_give_the_same_bits(
    model: nn.Module, groups: Groups, ids: Tensor, activation_memory: float
) -> None:
    want = score(model, groups, ids.split(2), activation_memory=1000)
    got = score(model, groups, ids.split(2), activation_memory=activation_memory)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert want.details["recomputed_blocks"] == 0
    assert got.details["recomputed_blocks"] == {0: 3, 1e-3: 3, 1000: 0}.get(
        activation_memory, got.details["recomputed_blocks"]
    )


@pytest.mark.parametrize("criterion", [*GRADIENT, "random", "l1"])
def test_the_same_seed_gives_the_same_bits(model: nn.Module, groups: Groups, ids: Tensor, criterion: str) -> None:
    a, b = (score(model, groups, ids.split(4), criterion, seed=7) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 2]])
def test_scoring_some_layers_gives_their_scores_among_all(
    model: nn.Module, groups: Groups, ids: Tensor, layers: list[int]
) -> None:
    part = score(model, groups, ids.split(3), roles=["ffn"], layers=layers)
    full = score(model, groups, ids.split(3))
    assert list(part) == [f"model.layers.{i}.mlp:ffn" for i in layers]
    assert all(torch.equal(part[n], full[n]) for n in part)
    bare = score(model, groups, ids.split(3), roles=["ffn"], layers=layers, activation_memory=0)
    assert all(torch.equal(bare[n], full[n]) for n in bare)
    assert bare.details["recomputed_blocks"] == 3 - layers[0]  # those below need no backward pass


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("criterion", GRADIENT)
def test_never_more_than_one_blocks_gradients_are_alive(
    model: nn.Module, groups: Groups, ids: Tensor, criterion: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveGradients(model, monkeypatch)
    score(model, groups, ids.split(size), criterion, roles=["kv_heads", "ffn"], route="gradients")
    block = sum(p.nbytes for n, p in model.named_parameters() if n.startswith("model.layers.0.") and "norm" not in n)
    assert live.arrivals >= 21
    assert 0 < live.most <= block * (2 if criterion == "param_mix" else 1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("criterion", "size"), [("param_first", 6), ("vectorize", 2), ("param_second", 2)])
def test_whole_backward_passes_free_each_gradient_as_it_comes(
    model: nn.Module, groups: Groups, ids: Tensor, whole: Any, criterion: str, size: int, monkeypatch: Any
) -> None:
    whole()
    live = LiveGradients(model, monkeypatch)
    score(model, groups, ids.split(size), criterion, roles=["kv_heads", "ffn"], route="gradients")
    largest = max(p.nbytes for n, p in model.named_parameters() if "layers" in n)
    assert 0 < live.most <= largest


def _state(model: nn.Module) -> list[Any]:
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        [sorted(m.__dict__) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        torch.is_grad_enabled(),
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def used(model: nn.Module, ids: Tensor) -> nn.Module:
    """A model in the middle of somebody's training: modes, flags and gradients of its own."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("criterion", [*GRADIENT, "l2", "random"])
@pytest.mark.parametrize("sweep", [True, False])
def test_the_model_is_left_as_it_was(
    used: nn.Module, groups: Groups, ids: Tensor, whole: Any, criterion: str, sweep: bool
) -> None:
    if not sweep:
        whole()
    before = _state(used)
    with torch.no_grad():
        score(used, groups, ids.split(2), criterion)
        assert not torch.is_grad_enabled()
    assert _same(_state(used), before)


@pytest.mark.parametrize("call", [1, 2, 7, 13])
def test_the_model_is_left_as_it_was_when_a_pass_fails(used: nn.Module, groups: Groups, ids: Tensor, call: int) -> None:
    before = _state(used)
    inner, calls = used.model.layers[1].mlp.up_proj, 0  # one rehearsal, six passes forward, six recomputed

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise KeyboardInterrupt

    handle = inner.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        score(used, groups, ids.split(1), "param_mix", activation_memory=0)
    handle.remove()
    assert _same(_state(used), before)


def test_dropout_is_off_while_scoring(groups: Groups, ids: Tensor) -> None:
    model = tiny_llama(attention_dropout=0.5)
    quiet = score(model, groups, ids)
    model.train()
    assert_close(score(model, groups, ids), quiet)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("criterion", GRADIENT)
def test_padding_changes_nothing(model: nn.Module, groups: Groups, ids: Tensor, criterion: str, side: str) -> None:
    samples = [ids[0], ids[1, :7], ids[2, :4]]
    padded, mask = torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10, dtype=torch.int64)
    for row, sample in enumerate(samples):
        at = slice(10 - len(sample), 10) if side == "left" else slice(0, len(sample))
        padded[row, at], mask[row, at] = sample, 1
    batch = {"input_ids": padded, "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = score(model, groups, [{**batch, "position_ids": positions}], criterion)
    assert_close(got, score(model, groups, [s[None] for s in samples], criterion), 1e-4)
    assert got.details["calibration"]["tokens"] == 21


def test_labels_of_minus_100_are_not_learnt_from(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, 6:] = -100
    got = score(model, groups, [{"input_ids": ids, "labels": labels}])
    assert_close(got, score(model, groups, ids[:, :6]))


def test_each_sample_weighs_the_same_however_long_it_is(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    """The mean of per-sample means: a long sample's tokens count less each."""
    short, long = ids[:1, :3], ids[1:2]
    double = copy.deepcopy(model).double()
    losses = [double(input_ids=s, labels=s).loss for s in (short, long)]
    ((losses[0] + losses[1]) / 2).backward()
    mlp = double.model.layers[2].mlp
    pairs = ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
    want = sum((p.detach() * p.grad).abs().sum(d) for p, d in pairs)
    got = score(model, groups, [short, long])
    assert torch.allclose(got["model.layers.2.mlp:ffn"][0].double(), want, rtol=1e-4)
    assert got.details["loss"] == pytest.approx(sum(x.item() for x in losses) / 2, rel=1e-5)


@pytest.mark.parametrize("criterion", GRADIENT)
def test_bfloat16_scores_rank_units_as_float32_does(groups: Groups, ids: Tensor, criterion: str) -> None:
    model = tiny_llama(initializer_range=0.1)
    half = score(copy.deepcopy(model).bfloat16(), groups, ids.split(2), criterion, roles=["ffn"])
    full = score(copy.deepcopy(model).bfloat16().float(), groups, ids.split(2), criterion, roles=["ffn"])
    assert half.details["dtype"] == "bfloat16"
    for name in full:
        a, b = half[name][0], full[name][0]
        assert float((a - b).norm() / b.norm()) < 0.15, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_weights_are_added_up_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16, 256 equal gradients are as many as 1000: adding the next one rounds it away."""
    p = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    collector = Collector(get_criterion("param_first"), {"p": p}, samples=1)
    for _ in range(1000):
        p.grad = torch.full_like(p, 0.125)
        collector.take("p")
        assert p.grad is None
    collector.finish(["p"])
    assert torch.equal(collector.sums["p"][0], torch.full((3,), 500.0))


def test_the_loss_scale_is_divided_out_of_float32_gradients_too() -> None:
    """Norms often stay in float32 beside float16 matrices."""
    p = nn.Parameter(torch.ones(3, 4))
    collector = Collector(get_criterion("param_first"), {"p": p}, samples=2, scale=8.0)
    for _ in range(2):
        p.grad = torch.full_like(p, collector.factor)
        collector.take("p")
    collector.finish(["p"])
    assert torch.equal(collector.sums["p"][0], torch.full((3,), 4.0))


def test_float16_gradients_that_would_vanish_are_kept_by_the_loss_scale(groups: Groups, ids: Tensor) -> None:
    """Most squared gradients of this model are below float16's smallest number, and many gradients themselves."""
    model = tiny_llama(initializer_range=0.02)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    half = score(copy.deepcopy(model).half(), groups, ids.split(2), "param_second", roles=["ffn"])
    full = score(copy.deepcopy(model).half().float(), groups, ids.split(2), "param_second", roles=["ffn"])
    assert half.details["loss_scale"] > 1
    for name in full:
        assert float((half[name] - full[name]).norm() / full[name].norm()) < 0.05, name


def test_a_loss_scale_that_overflows_float16_is_lowered(groups: Groups, ids: Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    half = score(copy.deepcopy(model).half(), groups, ids.split(2), roles=["ffn"])
    full = score(copy.deepcopy(model).half().float(), groups, ids.split(2), roles=["ffn"])
    assert half.details["loss_scale"] < 2**15
    for name in full:
        assert float((half[name] - full[name]).norm() / full[name].norm()) < 0.05, name


def test_whole_layers_are_scored_by_all_their_parameters(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    names = tuple(f"model.layers.{i}" for i in range(3))
    layers = Groups(
        [Group("model:layers", "layers", "model", None, 3, (), modules=names)], groups.shapes, groups.parameters
    )
    got = score(model, layers, ids.split(2), "param_second")["model:layers"]
    assert got.shape == (1, 3)
    double, want = copy.deepcopy(model).double(), torch.zeros(3, dtype=torch.float64)
    for sample in ids:
        double.zero_grad(set_to_none=True)
        double(input_ids=sample[None], labels=sample[None]).loss.backward()
        for i in range(3):
            want[i] += sum(((p.detach() * p.grad) ** 2).sum() / 6 for p in double.model.layers[i].parameters())
    assert torch.allclose(got[0].double(), want, rtol=1e-4)


class Skipping(nn.Module):
    """Two blocks and a path around them: the head reads the first block's output too, or both blocks one table."""

    def __init__(self, around: bool, between: bool = False, side: bool = False, table: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.gain = nn.Parameter(torch.full((8,), 1.5))
        self.head = nn.Linear(8, 13, bias=False)
        self.around, self.between, self.side = around, between, side
        self.table = nn.Embedding(5, 8) if table else None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        extra = self.gain * torch.ones(8) if self.side else None
        if self.table is not None:
            extra = self.table(input_ids % 5)
        first = self.blocks[0](x, extra)[0]
        y = self.blocks[1](first * self.gain if self.between else first, extra)[0]
        return self.head(y + first if self.around else y)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, None]:
        out = x + self.down(self.up(x).tanh())
        return (out if extra is None else out * extra), None


def _channels(net: nn.Module, tensors: dict[str, int]) -> Groups:
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    made = []
    for name, dim in tensors.items():
        axis = IndexMap(1, shapes[name][dim], (Lattice(0, 0, 1),))
        made.append(Group(name, "channels", "", None, axis.units, (Member(name, dim, axis),)))
    return Groups(made, shapes, frozenset(shapes))


@pytest.mark.parametrize("criterion", GRADIENT)
@pytest.mark.parametrize(
    ("shape", "scored", "reason"),
    [
        ({"around": True}, "blocks.0.up.weight", "blocks.0.up.weight acts outside its block"),
        ({"around": True}, "blocks.1.up.weight", "gradients pass by its blocks"),
        ({"around": False, "between": True}, "blocks.0.up.weight", "something happens to the residual stream"),
        ({"around": False, "side": True}, "blocks.0.up.weight", "gain acts outside its block"),
        ({"around": False, "table": True}, "table.weight", "table.weight acts outside its block"),
    ],
)
def test_a_model_that_is_no_chain_of_blocks_is_passed_backward_whole(
    criterion: str, shape: dict[str, bool], scored: str, reason: str
) -> None:
    torch.manual_seed(2)
    net = Skipping(**shape)
    groups = _channels(net, {scored: 0, "gain": 0})
    tokens = torch.randint(0, 13, (4, 6))
    # Without gradients of weights in the graph, what passes by the blocks is seen at their borders.
    by_activations = score(net, groups, tokens.split(2), criterion)
    assert by_activations.details["engine"].startswith("whole backward passes")
    got = score(net, groups, tokens.split(2), criterion, route="gradients")
    assert reason in got.details["engine"]
    assert_close(by_activations, got, 1e-4)
    double, grads = copy.deepcopy(net).double(), []
    p = double.get_parameter(scored)
    for t in tokens:
        grads.append(
            torch.autograd.grad(nn.functional.cross_entropy(double(t[None])[0, :-1], t[1:]), p)[0]
        )  # fmt: skip
    w, g = p.detach(), torch.stack(grads)
    h = (g**2).mean(0)
    want = {
        "vectorize": (w * g.mean(0)).sum(1).abs(), "param_first": (w * g.mean(0)).abs().sum(1),
        "param_second": (w**2 * h).sum(1), "param_mix": (w * g.mean(0) - 0.5 * w**2 * h).abs().sum(1),
    }[criterion]  # fmt: skip
    assert torch.allclose(got[scored][0].double(), want, rtol=1e-4)


def test_a_plain_chain_of_blocks_is_swept() -> None:
    net = Skipping(around=False)
    groups = _channels(net, {"blocks.0.up.weight": 0, "embedding.weight": 1, "head.weight": 1})
    tokens = torch.randint(0, 13, (4, 6))
    assert score(net, groups, tokens.split(2)).details["engine"] == "block sweep"


def test_blocks_that_share_weights_are_passed_backward_whole(ids: Tensor) -> None:
    net = Skipping(around=False)
    net.blocks[1].up = net.blocks[0].up
    groups = _channels(net, {"blocks.0.up.weight": 0})
    got = score(net, groups, (ids % 13).split(2))
    assert "is shared between blocks" in got.details["engine"]
    double = copy.deepcopy(net).double()
    logits = double(ids % 13)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), (ids % 13)[:, 1:].flatten()).backward()
    p = double.blocks[0].up.weight
    want = (p.detach() * p.grad).abs().sum(1)
    assert torch.allclose(got["blocks.0.up.weight"][0].double(), want, rtol=1e-4)


def test_units_that_no_token_reaches_score_zero() -> None:
    """An expert that the router never picks has no gradient."""

    class Unused(Skipping):
        def __init__(self) -> None:
            super().__init__(around=False)
            self.blocks[1].spare = nn.Linear(8, 4)

    net = Unused()
    groups = _channels(net, {"blocks.1.spare.weight": 0, "blocks.1.up.weight": 0})
    for criterion in GRADIENT:
        got = score(net, groups, torch.randint(0, 13, (2, 5)), criterion)
        assert torch.equal(got["blocks.1.spare.weight"], torch.zeros(1, 4)) and got["blocks.1.up.weight"].min() > 0


@pytest.mark.parametrize(
    ("where", "what"),
    [("model.layers.1.mlp.up_proj.weight", "nan"), ("model.norm.weight", "inf"), ("lm_head.weight", "nan")],
)
@pytest.mark.parametrize("criterion", ["param_first", "param_second"])
def test_weights_with_nan_or_infinity_are_named(
    model: nn.Module, groups: Groups, ids: Tensor, where: str, what: str, criterion: str
) -> None:
    model.get_parameter(where).data.view(-1)[3] = float(what)
    with pytest.raises(PyPruneError, match=f"{where}.*holds NaN or infinity"):
        score(model, groups, ids.split(2), criterion)


@pytest.mark.parametrize("criterion", ["l1", "l2", "random"])
def test_criteria_without_gradients_name_weights_with_nan_too(model: nn.Module, groups: Groups, criterion: str) -> None:
    model.get_parameter("model.layers.2.self_attn.k_proj.weight").data[1, 1] = float("nan")
    with pytest.raises(PyPruneError, match=r"layers\.2\.self_attn\.k_proj\.weight.*holds NaN or infinity"):
        score(model, groups, criterion=criterion)


@pytest.mark.parametrize("sweep", [True, False])
def test_a_loss_that_is_not_finite_is_told_from_a_gradient(
    model: nn.Module, groups: Groups, ids: Tensor, whole: Any, sweep: bool
) -> None:
    if not sweep:
        whole()
    model.lm_head.register_forward_hook(lambda m, a, out: out * float("inf") if out.shape[1] == 10 else out)
    with pytest.raises(PyPruneError, match="calibration: gives a loss that is NaN or infinite"):
        score(model, groups, ids.split(2))


def test_a_gradient_that_overflows_is_named() -> None:
    class Blown(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("inf")

    net = Skipping(around=False)
    net.blocks[0].down.register_forward_hook(lambda m, a, out: Blown.apply(out))
    groups = _channels(net, {"blocks.0.up.weight": 0})
    with pytest.raises(PyPruneError, match=r"blocks\.0\.up\.weight.*has a gradient with NaN or infinity"):
        score(net, groups, torch.randint(0, 13, (2, 5)))

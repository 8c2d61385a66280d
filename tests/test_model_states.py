"""Models as users hand them over: compiled, emptied, under autocast, with hooks on gradients, without a head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_llama import tiny_llama
from torch import nn

import pyprune
from pyprune.basis import change_basis
from pyprune.compensation import compensate
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.search import search_plan
from pyprune.selection.plan import Plan

ROLES = ["kv_heads", "ffn"]


class Case:
    def __init__(self) -> None:
        self.model = tiny_llama()
        self.groups: Groups = pyprune.discover(self.model)
        self.ids = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(0))
        self.scores = pyprune.score(self.model, self.groups, self.ids, "wanda", roles=ROLES)
        self.plan: Plan = pyprune.select(self.groups, self.scores, 0.2)

    def stages(self) -> dict[str, Any]:
        """Name -> stage, called with a model; what it gives, or what it left of the model, as tensors."""

        def weights(model: nn.Module) -> list[torch.Tensor]:
            return [p.detach().clone() for p in getattr(model, "_orig_mod", model).parameters()]

        def score(name: str) -> Any:
            return lambda m: list(pyprune.score(m, self.groups, self.ids, name, roles=ROLES).by_group.values())

        return {
            **{name: score(name) for name in ("param_first", "wanda", "obs")},
            "token_fisher": lambda m: list(
                pyprune.score(m, self.groups, self.ids, "token_fisher", roles=["ffn"]).by_group.values()
            ),
            "compensate": lambda m: (compensate(m, self.plan, self.ids), weights(m))[1],
            "change_basis": lambda m: (change_basis(m, self.groups, self.ids), weights(m))[1],
            "measure_budget": lambda m: [
                torch.tensor([float(w) for w in pyprune.measure_budget(m, self.groups, "macs").weights.values()])
            ],
            "search_plan": lambda m: [
                torch.tensor(cut.width)
                for cut in search_plan(
                    m, self.groups, self.scores, self.ids, ratio=0.2, allocation="divergence", roles=["ffn"]
                ).cuts
            ],
        }


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


STAGES = list(Case().stages())


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled, compiled_in_place])
@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_model_gives_what_the_model_gives(case: Case, stage: str, how: Any) -> None:
    run = case.stages()[stage]
    plain, wrapped = (run(made(copy.deepcopy(case.model))) for made in (lambda m: m, how))
    assert len(plain) == len(wrapped) and all(map(torch.equal, plain, wrapped))


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_changes_nothing(case: Case, stage: str) -> None:
    run = case.stages()[stage]
    plain = run(copy.deepcopy(case.model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(copy.deepcopy(case.model))
    assert all(map(torch.equal, plain, cast))


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_callers_modes_change_nothing_in_what_is_pruned_trained_and_measured(mode: Any) -> None:
    def line(model: nn.Module) -> list[Any]:
        ids = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(0))
        out = pyprune.prune(
            model, ratio=0.2, calibration=ids, criterion="wanda", compensation="least-squares", compensation_gains=True,
        )  # fmt: skip
        pruned = [p.detach().clone() for p in out.model.parameters()]
        pyprune.recover(out.model, data=ids, val_data=ids[:2], bf16=False, lora_r=2, train_batch_size=2)
        found = pyprune.evaluate(out.model, eval_text=ids.flatten(), eval_length=16)
        assert not any(p.is_inference() for p in out.model.parameters())
        return [pruned, [p.detach().clone() for p in out.model.parameters()], found["perplexity"]["perplexity"]]

    models = tiny_llama(), tiny_llama()
    plain = line(models[0])
    with mode():
        within = line(models[1])
    assert all(map(torch.equal, plain[0], within[0])) and all(map(torch.equal, plain[1], within[1]))
    assert not all(map(torch.equal, plain[0], plain[1])) and plain[2] == within[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_made_in_inference_mode_is_named(case: Case, stage: str) -> None:
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(PyPruneError, match=r"was made in torch\.inference_mode"):
        case.stages()[stage](model)
    # Nothing of it has to change to be measured.
    measured = [pyprune.evaluate(m, eval_text=case.ids.flatten(), eval_length=16)["perplexity"]["perplexity"]
                for m in (model, tiny_llama())]  # fmt: skip
    assert measured[0] == measured[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_whose_weights_moved_away_is_named(case: Case, stage: str) -> None:
    model = copy.deepcopy(case.model)
    pyprune.apply(model, case.plan)
    with pytest.raises(PyPruneError, match="has weights that are not in memory"):
        case.stages()[stage](model)


def whole_line(case: Case, folder: Any) -> dict[str, Any]:
    """Name -> what begins with a model and ends with another or with figures."""
    return {
        "prune": lambda m: pyprune.prune(m, ratio=0.2, calibration=case.ids),
        "prune by weights": lambda m: pyprune.prune(m, ratio=0.2, criterion="l2"),
        "recover": lambda m: pyprune.recover(m, data=case.ids.repeat(4, 2), cutoff=32, bf16=False),
        "save": lambda m: pyprune.save(m, None, folder / "out"),
        "export": lambda m: pyprune.export(m, folder / "out", "hetero-hf"),
        "evaluate": lambda m: pyprune.evaluate(m, eval_text=case.ids.flatten(), eval_length=16),
    }


@pytest.mark.parametrize("verb", ["prune", "prune by weights", "recover", "save", "export", "evaluate"])
def test_every_verb_names_a_model_whose_weights_moved_away(case: Case, verb: str, tmp_path: Any) -> None:
    model = copy.deepcopy(case.model)
    pyprune.apply(model, case.plan)
    with pytest.raises(PyPruneError, match="has weights that are not in memory"):
        whole_line(case, tmp_path)[verb](model)


def test_weights_that_come_when_the_model_runs_are_evaluated(case: Case, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = pyprune.save(copy.deepcopy(case.model), None, tmp_path / "in")
    places = {"model.layers.1": "disk"}
    places |= dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"], "cpu")
    options = {"device_map": {**places, "model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path / "away")}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert any(p.is_meta for p in model.parameters())
    evaluate = whole_line(case, tmp_path)["evaluate"]
    assert evaluate(model)["perplexity"]["nll"] == evaluate(case.model)["perplexity"]["nll"]


@pytest.mark.parametrize("verb", ["prune", "prune by weights", "recover", "save", "export"])
def test_a_model_with_an_adapter_is_refused_at_once(case: Case, verb: str, tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(PyPruneError, match=r"PeftModelForCausalLM.* Merge the adapter first: model = model.merge_and_"):
        whole_line(case, tmp_path)[verb](get_peft_model(copy.deepcopy(case.model), settings))


def test_a_compiled_model_is_pruned_as_what_is_inside(case: Case, tmp_path: Any) -> None:
    prune = whole_line(case, tmp_path)["prune by weights"]
    plain, wrapped = (prune(m).model for m in (copy.deepcopy(case.model), compiled(copy.deepcopy(case.model))))
    assert torch.equal(plain(case.ids).logits, wrapped(case.ids).logits)


def test_a_compiled_model_is_saved_as_what_is_inside(case: Case, tmp_path: Any) -> None:
    pyprune.save(compiled(copy.deepcopy(case.model)), None, tmp_path / "out")
    found = pyprune.load(tmp_path / "out")
    assert torch.equal(found(case.ids).logits, case.model(case.ids).logits)


@pytest.mark.parametrize("route", ["activations", "gradients"])
def test_an_optimizer_in_the_backward_pass_changes_no_weight_and_is_there_afterwards(case: Case, route: str) -> None:
    model = copy.deepcopy(case.model)
    before = pyprune.score(model, case.groups, case.ids, roles=ROLES, route=route)
    steps = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps[p].step())
        p.register_hook(lambda grad: grad * 0)
    again = pyprune.score(model, case.groups, case.ids, roles=ROLES, route=route)
    assert all(map(torch.equal, before.by_group.values(), again.by_group.values()))
    assert all(map(torch.equal, model.parameters(), case.model.parameters()))
    calls = []
    for p in model.parameters():
        p.register_hook(lambda grad: calls.append(1))
    model(case.ids).logits.sum().backward()
    assert len(calls) == len(steps) and not any(p.grad.any() for p in model.parameters())
    with pytest.raises(PyPruneError, match="hooks on its gradient, which would be lost"):
        pyprune.apply(model, case.plan)


def test_a_model_without_a_head_is_checked_by_its_hidden_states(case: Case) -> None:
    body = copy.deepcopy(case.model).model
    groups = pyprune.discover(body)
    plan = pyprune.select(groups, pyprune.score(body, groups, criterion="l2", roles=ROLES), 0.1, roles=ROLES)
    masked = copy.deepcopy(body)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for cut in plan.cuts:
            for name, dim, gone in cut.removed_positions():
                parameters[name].index_fill_(dim, torch.from_numpy(gone), 0)
        small = pyprune.apply(body, plan)
        wanted, found = (m(case.ids).last_hidden_state for m in (masked, small))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

"""What scoring leaves behind."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers_compensation import ids
from helpers_llama import tiny_llama

import pyprune


def graphs() -> int:
    """Tensors that hang in an autograd graph, and with it whatever the graph saved: weights above all."""
    gc.collect()
    return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())


@pytest.mark.parametrize(
    ("criterion", "route"),
    [("param_second", "activations"), ("param_second", "gradients"), ("group_fisher", "activations"), ("wanda", None)],
)
def test_no_graph_and_so_no_weight_outlives_scoring(criterion: str, route: str | None) -> None:
    model = tiny_llama()
    before = graphs()
    pyprune.score(model, pyprune.discover(model), ids(), criterion=criterion, route=route, roles=["ffn"])
    assert graphs() == before

"""A run without the weights' values, and what of it has values all the same."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.discovery.valueless import ValuelessOps


class Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.run = ValuelessOps()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})


@pytest.fixture
def weight():
    return torch.empty(4, 6, device="meta")


def test_what_is_made_from_sizes_has_values_even_where_the_model_asks_for_the_weights_device(weight):
    with Mode():
        positions = torch.arange(6, device=weight.device)
        assert (positions[1:] > positions[:-1]).all().item()
        assert positions.to(weight.device).tolist() == [0, 1, 2, 3, 4, 5]


def test_what_touches_a_weight_has_none(weight):
    with Mode():
        out = weight * torch.arange(6.0) + 1
        assert out.is_meta and out.shape == (4, 6)
        assert torch.nn.functional.embedding(torch.tensor([[0, 3]]), weight).shape == (1, 2, 6)
        with pytest.raises(RuntimeError, match="item"):
            out.sum().item()


def test_repeated_ops_keep_shape_strides_and_type(weight):
    with Mode():
        for _ in range(2):
            assert (weight.t() + weight.t()).stride() == (weight.t() + 0.0).stride()
            assert (weight > 0).dtype == torch.bool
            assert torch.empty(3, dtype=torch.int64, device="meta").add(2).dtype == torch.int64
            assert torch.empty(3, dtype=torch.int64, device="meta").add(2.0).dtype == torch.float32


def test_views_stay_views(weight):
    with Mode():
        for _ in range(2):
            assert weight.view(24)._is_view()


def test_unknown_values_are_not_written_over_known_ones(weight):
    with Mode(), pytest.raises(RuntimeError, match="unknown values over known ones"):
        torch.zeros(4, 6).copy_(weight)

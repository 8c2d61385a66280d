"""Kernels: the arithmetic and the memory movement of pruning, on CPU and CUDA, with a PyTorch reference for each.

:func:`salience` sums a per-element importance over rows and columns, :func:`accumulate_square_` keeps the diagonal of
the empirical Fisher matrix, :func:`gather` copies kept slices: they take lists of tensors, so one call serves a whole
model, and :func:`prepare_salience` makes one ready to be made often. :func:`activation_salience` scores one weight from
activations, without its gradient; :func:`channel_moments`, :func:`channel_dots` and :func:`gram` reduce activations to
what scores need of them. Where no compiled library is installed, :mod:`pyprune.ops.reference` computes the same.
``torch.compile(fullgraph=True)`` takes all of them but :func:`gather`, whose shapes are those of positions in memory,
and prepared calls.
"""

from pyprune.ops._native import backend_info
from pyprune.ops.accumulate import accumulate_square_
from pyprune.ops.activation import activation_salience
from pyprune.ops.channels import channel_dots, channel_moments, gram
from pyprune.ops.gather import gather
from pyprune.ops.product import fast_products, product
from pyprune.ops.salience import PreparedSalience, prepare_salience, salience

__all__ = [
    "PreparedSalience", "accumulate_square_", "activation_salience", "backend_info", "channel_dots", "channel_moments",
    "fast_products", "gather", "gram", "prepare_salience", "product", "salience",
]  # fmt: skip

"""Coordinates in which the values of a head can be cut with least loss.

Between the matrix that makes a head's values and the one that reads them lies attention, which mixes tokens and never
dimensions: values v = V x may be written in any basis, T v, when the readers of the same head take T^-1 with them, and
the model stays what it was. Wanted is the basis of which the first coordinates carry most of what the readers give.

A reader W_c of inputs a_c (one for each query head c that reads the same values) loses tr(W_c P C_c P^T W_c^T) when a
part P of its inputs is dropped, C_c = E[a_c a_c^T]. With the mean C for every C_c, whitened coordinates C^-1/2 a
have a unit second moment, and there the loss of a direction u is u^T M u,

    M = C^1/2 (sum_c W_c^T W_c) C^1/2,     M = U diag(s) U^T,     T = U^T C^-1/2,

so that no projection of the same rank loses less than dropping the last coordinates of T v does. For one reader, where
C is its own, this is the truncated singular value decomposition of W C^1/2 (MoDeGPT, arXiv 2408.09632, decomposes value
and output matrices so, with the moments of what values are made from).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # least second moment of a direction, as a fraction of the greatest: T stays invertible


def principal_basis(moments: Tensor, readers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T, T^-1, s): float64 [units, units], [units, units], [units]; s falls.

    Args:
        moments: C_c, float64 [copies, units, units].
        readers: W_c, float64 [copies, outputs, units].

    A direction with less than :data:`FLOOR` of the greatest second moment counts as if it had that much.
    """
    power, axes = torch.linalg.eigh(moments.mean(0))
    least = power.max().clamp_min(torch.finfo(power.dtype).tiny) * FLOOR
    root = power.clamp_min(least).sqrt()
    back = (axes * root) @ axes.t()
    white = (axes / root) @ axes.t()
    gain = torch.einsum("cou,cov->uv", readers, readers)
    values, directions = torch.linalg.eigh(back @ gain @ back)
    values, directions = values.flip(0), directions.flip(1)
    # An eigenvector's sign is the library's choice: its largest entry is positive.
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    return directions.t() @ white, back @ directions, values.clamp_min(0)

"""Layer-wise reconstruction: what is left of an FFN is fitted to what all of it gave.

An FFN computes y = D a(z_1, z_2, ...) with z_i = W_i x, and channel j of ``a`` depends on row j of every W_i alone.
Once channels are gone, all that is left of D and of the W_i together is fitted to the outputs of the whole,

    min over D, W_i   sum_t w_t |y_t - D a(W_1 x_t, W_2 x_t, ...)|^2

by Adam (Kingma and Ba 2015, algorithm 1) on shuffled tokens, from where they are: a few times over all tokens, with
steps in proportion to each matrix's own size, longer where the error is larger, that grow over the first tenth and then
fall to nothing. There are no labels and there is no pass through the rest of the model: inputs and outputs of one FFN
are all that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops

EPOCHS = 4
TOKENS = 1024  # in one step, at most
STEPS = 200  # at least, with fewer tokens in each
RATE = 0.07  # the largest step of an entry, as a part of its matrix's root mean square, for each unit of relative error
RATES = (0.003, 0.03)  # bounds of it
WARM_UP = 0.1  # of all steps
DECAYS = (0.9, 0.99)  # beta_1 and beta_2

Activation = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Feeder:
    """A matrix that feeds an activation, and what enters it.

    Attributes:
        x: inputs, [tokens, inputs]; products are made in its dtype.
        matrix: W, float32 [channels, inputs].
        bias: float32 [channels], stays as it is, or None.
    """

    x: Tensor
    matrix: Tensor
    bias: Tensor | None


def reconstruct(
    activation: Activation, feeders: Mapping[str, Feeder], reader: Tensor, offset: Tensor | None, targets: Tensor,
    weights: Tensor, error: float,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """The W_i and D of the formula above, float32. Equal inputs give equal results on one machine.

    Args:
        activation: from what every feeder gives for some tokens, [tokens, channels], to a, [tokens, kept].
        feeders: by name, of one dtype.
        reader: D, [outputs, kept].
        offset: what is added to y, [outputs], stays as it is, or None.
        targets: y, [tokens, outputs].
        weights: w, float32 [tokens].
        error: what is minimised, where it starts, as a fraction of sum_t w_t |y_t|^2.
    """
    rate = min(max(RATE * error, RATES[0]), RATES[1])
    tokens = len(targets)
    size = min(TOKENS, max(1, tokens * EPOCHS // STEPS), tokens)
    each = tokens // size  # what is left over of an epoch comes in another one's
    problem = _Problem(activation, feeders, offset)
    values = [v.float().clone() for v in (*(f.matrix for f in feeders.values()), reader)]
    groups = [{"params": [v], "lr": rate * float(v.square().mean().sqrt())} for v in values]
    adam = torch.optim.Adam(groups, betas=DECAYS, eps=1e-12)
    course = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: share_of_step((k + 1) / (EPOCHS * each)))
    scale = float((weights[:, None] * targets.float().square()).sum() / tokens) or 1.0
    random = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        order = torch.randperm(tokens, generator=random).to(targets.device)
        for at in order.split(size)[:each]:
            gradients = problem.gradients(at, targets[at], weights[at, None] / (size * scale), values)
            for v, g in zip(values, gradients, strict=True):
                v.grad = g
            adam.step()
            course.step()
    *matrices, found = values
    return dict(zip(feeders, matrices, strict=True)), found


def share_of_step(done: float) -> float:
    """Of the largest step, behind this part of all steps."""
    return min(1.0, done / WARM_UP) * (1.0 - done)


class _Problem:
    def __init__(self, activation: Activation, feeders: Mapping[str, Feeder], offset: Tensor | None) -> None:
        self.activation, self.feeders, self.offset = activation, feeders, offset
        self.dtype = next(iter(feeders.values())).x.dtype

    def gradients(self, at: Tensor, targets: Tensor, weights: Tensor, values: list[Tensor]) -> list[Tensor]:
        """Half the gradient by every matrix of the weighted error on the tokens ``at``."""
        *matrices, reader = values
        inputs = {place: x[at] for place, x in {f.x.data_ptr(): f.x for f in self.feeders.values()}.items()}
        given = {}
        for (name, f), matrix in zip(self.feeders.items(), matrices, strict=True):
            z = _product(inputs[f.x.data_ptr()], matrix.to(self.dtype))
            given[name] = (z if f.bias is None else z + f.bias).requires_grad_()
        with torch.enable_grad():
            a = self.activation(given)
        narrow, read = a.detach().to(self.dtype), reader.to(self.dtype)
        outputs = _product(narrow, read)
        outputs = outputs if self.offset is None else outputs + self.offset
        missed = ((outputs - targets.float()) * weights).to(self.dtype)
        back = torch.autograd.grad(a, list(given.values()), _product(missed, read.t()).to(a.dtype))
        found = [
            _product(g.to(self.dtype).t(), inputs[f.x.data_ptr()].t())
            for g, f in zip(back, self.feeders.values(), strict=True)
        ]
        return [*found, _product(missed.t(), narrow.t())]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``, as float32."""
    return ops.product(a, b).float()

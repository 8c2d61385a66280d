"""Salience from activations: what went into a layer and the gradient that came back, and never a weight's gradient.

For a linear layer y = x W^T the gradient of sample b is G_b = dy_b^T x_b, and both factors pass by during one backward
pass over many samples. :func:`pyprune.ops.activation_salience` turns them into row and column sums tile by tile; where
only sums of w * G_b over whole rows and columns are wanted, they need no matrix product at all:

    sum over a row of W:     sum_t dy_t * (y_t - bias)
    sum over a column of W:  sum_t x_t * dx_t,  with dx_t = W^T dy_t

Layers are found by the functions that they call, so a linear layer, its subclasses, a ``Conv1D``, one expert of stacked
weights and a head tied to the embedding are all seen. What uses a weight in another way gets its gradient from
autograd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from pyprune.importance.collector import Collector
from pyprune.importance.registry import Criterion
from pyprune.ops import activation_salience, channel_dots, product
from pyprune.ops.product import is_faster as product_is_faster


class NotTappable(Exception):
    """A layer's inputs are not [samples, length, width]."""


class UsedAgain(Exception):
    """A matrix or bias was used more often than in the rehearsal: by a layer that takes long samples in pieces."""


class Key(NamedTuple):
    """A matrix: a parameter, or one expert of a stacked one."""

    name: str
    expert: int | None = None


@dataclass(frozen=True)
class Product:
    """What makes a gradient: the factors that go with the rows and with the columns of the matrix as it is stored,
    each [samples, tokens, size]."""

    rows: Tensor
    cols: Tensor


class GradientTap(torch.autograd.Function):
    """Identity in front of a layer. Going back, hands the layer's input and that input's gradient to ``sink``.

    The input is saved before the layer computes, so that recomputing a block still stops short of its last product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.sink(ctx.saved_tensors[0], dx)
        return dx, None


class _After(torch.autograd.Function):
    """Identity behind a layer. Going back, hands on the output's gradient and, where it is kept, the output.

    Its node in the graph has the layer's matrix as ``parameter``, a name: autograd itself does not see it there.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, keep: bool, sink: Callable[[Tensor, Tensor | None], None], parameter: str
    ) -> Tensor:
        ctx.save_for_backward(*[y] * keep)
        ctx.sink, ctx.parameter = sink, parameter
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.sink(dy, next(iter(ctx.saved_tensors), None))
        return dy, None, None, None


class _Linear(torch.autograd.Function):
    """A linear layer whose weight and bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = product(x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return product(dy, ctx.weight.t()), None, None


class _Mode(TorchFunctionMode):
    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.taps = taps

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        tap = _TAPS.get(func)
        out = None if tap is None else tap(self.taps, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if out is None else out


def _sums_by_place(places: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums [samples, count] of the values [samples, tokens] at each place, equal in every bit when repeated."""
    out = values.new_zeros(places.shape[0], count)
    if not values.is_cuda:
        return out.scatter_add_(1, places, values)
    # On a GPU that adds by atomics, in whatever order; this one sorts first.
    samples = torch.arange(places.shape[0], device=places.device)[:, None].expand_as(places)
    return out.index_put_((samples, places), values, accumulate=True)


class Taps:
    """Taps on the layers that hold scored parameters.

    Args:
        parameters: name -> parameter, the scored ones. Those that need no gradient for a while are left alone.
        criterion: what is measured.

    Attributes:
        apart: the layers see [samples, length, width]; otherwise a step must be one sample.
        uses: how often a forward pass used each matrix or bias, once rehearsed.
        collector: where sums go; None lets them go nowhere.
        whole: parameters whose samples all arrive in one backward pass.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], criterion: Criterion) -> None:
        self.parameters = dict(parameters)
        self.criterion = criterion
        self.apart = True
        self.uses: Counter[Key] = Counter()
        self.collector: Collector | None = None
        self.whole: frozenset[str] = frozenset()
        self._names = {id(p): name for name, p in parameters.items()}
        self._stacked = {p.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.dim() == 3}
        self._rehearsing = False
        self._rows: int | None = None
        self._held: dict[Key, list[Product]] = {}
        self._held_biases: dict[Key, list[Tensor]] = {}
        self._spent: set[Key] = set()  # in this backward pass
        self._hold_all = False

    def active(self) -> TorchFunctionMode:
        """A context manager; within it layers are tapped, and their parameters get no gradient from autograd."""
        return _Mode(self)

    @contextmanager
    def rehearsal(self, rows: int | None) -> Iterator[None]:
        """Within it uses are counted, and nothing is passed backward.

        Args:
            rows: refuse inputs that are not [rows, length, width]; None takes them as they are.

        Raises:
            NotTappable: there is one.
        """
        self.uses.clear()
        self._rehearsing, self._rows = True, rows if self.criterion.separate else None
        try:
            yield
        finally:
            self._rehearsing, self._rows = False, None

    @property
    def seen(self) -> set[str]:
        """The parameters that a rehearsed forward pass used in no other way than through taps."""
        return {key.name for key in self.uses} & set(self.parameters)

    def drop(self, names: set[str]) -> None:
        """Leave these parameters to autograd."""
        for name in names & set(self.parameters):
            p = self.parameters.pop(name)
            del self._names[id(p)]
            self._stacked.pop(p.untyped_storage().data_ptr(), None)

    def begin(self, collector: Collector) -> None:
        """Sums go there from now on; what a backward pass that was broken off left here is forgotten."""
        self.collector = collector
        self._held, self._held_biases = {}, {}
        self._spent.clear()

    def hold_all(self) -> None:
        """Spend nothing before a backward pass is over: behind :class:`UsedAgain`."""
        self._hold_all = True

    # -- forward -----------------------------------------------------------------------------------------------------
    def find(self, weight: Any) -> Key | None:
        """Which matrix it is, if it is one that is scored now."""
        name = self._names.get(id(weight))
        if name is not None:
            return Key(name) if weight.requires_grad else None
        if not self._stacked or not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        name = self._stacked.get(weight.untyped_storage().data_ptr())
        p = None if name is None else self.parameters[name]
        if name is None or p is None or not p.requires_grad:
            return None
        place, rest = divmod(int(weight.storage_offset() - p.storage_offset()), int(p.stride(0)))
        fits = weight.shape == p.shape[1:] and weight.stride() == p.stride()[1:] and rest == 0
        return Key(name, place) if fits else None

    def _count(self, key: Key, x: Tensor, dims: int) -> None:
        if not self._rehearsing:
            return
        if self._rows is not None and (x.dim() != dims or x.shape[0] != self._rows):
            raise NotTappable(f"the layer of {key.name} is given {list(x.shape)} for {self._rows} samples")
        self.uses[key] += torch.is_grad_enabled()

    def layer(self, key: Key, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """A linear layer between taps."""
        self._count(key, x, 3)
        if not x.requires_grad:  # nothing below is scored; without it the taps would see no gradient either
            x = x.detach().requires_grad_()
        arrived: list[tuple[Tensor, Tensor | None]] = []
        own = None if bias is None else self.find(bias)
        if own is not None:
            self._count(own, x, 3)
        w, b = weight.detach(), None if bias is None else bias.detach() if own is not None else bias

        def back(x: Tensor, dx: Tensor) -> None:
            dy, y = arrived.pop()
            if self.collector is not None:
                self._bias(own, dy, b)
                self._matrix(key, w, transposed, x, dx, dy, None if y is None else y if b is None else y - b)

        x = GradientTap.apply(x, back)
        live = b is not None and b.requires_grad  # made of parameters that autograd serves
        y = _Linear.apply(x, w if not transposed else w.t(), None if live else b)
        if live:
            y = y + b
        return _After.apply(y, self.criterion.signed, lambda dy, y: arrived.append((dy, y)), key.name)

    def table(self, key: Key, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        """An embedding with a tap behind it."""
        self._count(key, ids, 2)
        y = embedding(ids, weight.detach()).requires_grad_()

        def back(dy: Tensor, y: Tensor | None) -> None:
            if self.collector is None:
                return
            places, dy = self._tokens(ids[..., None]), self._tokens(dy)
            if padding is not None:
                dy = dy.masked_fill(places == padding, 0)
            if y is not None:
                y = self._tokens(y)
                dots = (dy.to(torch.promote_types(dy.dtype, torch.float32)) * y).sum(-1)
                self._add(key, _sums_by_place(places[..., 0], dots, weight.shape[0]), channel_dots(dy, y))
            else:
                hot = dy.new_zeros(*dy.shape[:2], weight.shape[0]).scatter_(2, places, 1.0)
                self._elements(key, weight.detach(), Product(hot, dy))

        return _After.apply(y, self.criterion.signed, back, key.name)

    # -- backward ----------------------------------------------------------------------------------------------------
    def _tokens(self, x: Tensor) -> Tensor:
        """[samples, tokens, width], or all in one where samples need not or cannot be told apart."""
        x = x.detach()
        return x if self.apart and self.criterion.separate else x.reshape(1, -1, x.shape[-1])

    def _bias(self, key: Key | None, dy: Tensor, bias: Tensor | None) -> None:
        if key is None or self.collector is None or bias is None:
            return
        wide = torch.promote_types(dy.dtype, torch.float32)
        grads = self._tokens(dy).sum(1, dtype=wide)
        if self.criterion.per_sample:
            rows = grads * bias
            self._add(key, rows, rows.sum(1, keepdim=True))
        elif self._again(key):
            self._held_biases.setdefault(key, []).append(grads)
        else:
            self._spend_bias(key, grads)

    def _spend_bias(self, key: Key, grads: Tensor) -> None:
        assert self.collector is not None
        for of_sample in grads:
            self.collector.add(key.name, of_sample)

    def _again(self, key: Key) -> bool:
        """Whether its gradient comes in parts, which have to wait for each other.

        Raises:
            UsedAgain: a part of it is spent.
        """
        if self._hold_all or self.uses[key] > 1:
            return True
        if key in self._spent:
            raise UsedAgain(key.name)
        self._spent.add(key)
        return False

    def _matrix(
        self, key: Key, weight: Tensor, transposed: bool, x: Tensor, dx: Tensor, dy: Tensor, y: Tensor | None
    ) -> None:
        x, dy = self._tokens(x), self._tokens(dy)
        if y is not None:
            outs, ins = channel_dots(dy, self._tokens(y)), channel_dots(x, self._tokens(dx))
            self._add(key, *((ins, outs) if transposed else (outs, ins)))
        else:
            self._elements(key, weight, Product(x, dy) if transposed else Product(dy, x))

    def _add(self, key: Key, rows: Tensor, cols: Tensor) -> None:
        """Signed sums, [samples, size]; the loss's factor is still in them."""
        assert self.collector is not None
        rows, cols = rows / self.collector.scale, cols / self.collector.scale
        if not self.criterion.per_sample:
            rows, cols = rows.sum(0), cols.sum(0)
        self.collector.add_sums(key.name, rows, cols, key.expert)

    def _elements(self, key: Key, weight: Tensor, product: Product) -> None:
        if self._again(key):
            self._held.setdefault(key, []).append(product)
        else:
            self._spend(key, weight, product)

    def flush(self) -> None:
        """A backward pass is over: spend what it gave of matrices and biases that it used more than once."""
        held, self._held = self._held, {}
        biases, self._held_biases = self._held_biases, {}
        self._spent.clear()
        for key, products in held.items():
            p = self.parameters[key.name].detach()
            rows, cols = (_joined([getattr(q, side) for q in products]) for side in ("rows", "cols"))
            self._spend(key, p if key.expert is None else p[key.expert], Product(rows, cols))
        for key, grads in biases.items():
            self._spend_bias(key, torch.stack(grads).sum(0))
        if self.collector is not None:
            self.collector.next_samples()

    def _spend(self, key: Key, weight: Tensor, product: Product) -> None:
        """Sums at once where they are final or add up; else the gradient, which waits for the other batches."""
        collector, formula = self.collector, self.criterion.formula
        assert collector is not None and formula is not None
        if self.criterion.additive or key.name in self.whole:
            rows, cols = activation_salience(
                product.cols, product.rows, weight, formula, gradient_scale=collector.gradient_share,
                curvature_scale=collector.curvature_share,
            )  # fmt: skip
            collector.add_sums(key.name, rows, cols, key.expert)
            return
        for rows, cols in zip(product.rows, product.cols, strict=True):
            collector.add(key.name, rows.t() @ cols, key.expert)


def _joined(factors: list[Tensor]) -> Tensor:
    """Along the tokens; samples are the same."""
    return torch.cat(factors, dim=1)


def _linear(taps: Taps, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    key = taps.find(weight)
    if key is not None:
        return taps.layer(key, input, weight, bias, transposed=False)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return _Linear.apply(input, weight, bias) if product_is_faster(input) and not trained else None


def _addmm(
    taps: Taps, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    key = taps.find(mat2) if beta == alpha == 1 and input.dim() == 1 else None
    return None if key is None else taps.layer(key, mat1, mat2, input, transposed=True)


def _matmul(taps: Taps, input: Tensor, other: Tensor) -> Tensor | None:
    key = taps.find(other) if isinstance(input, Tensor) and input.dim() >= 2 else None
    return None if key is None else taps.layer(key, input, other, None, transposed=True)


def _embedding(
    taps: Taps, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor | None:  # fmt: skip
    key = None if max_norm is not None or scale_grad_by_freq else taps.find(weight)
    return None if key is None else taps.table(key, input, weight, padding_idx)


_TAPS: dict[Any, Callable[..., Tensor | None]] = {
    linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    embedding: _embedding,
}


@contextmanager
def experts_one_by_one(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Stacked experts compute one after the other within it, as transformers' eager implementation has it."""
    configs: dict[int, Any] = {}
    if any(p.dim() == 3 for p in parameters.values()):
        found = [getattr(module, "config", None) for module in model.modules()]
        configs = {id(c): c for c in found if hasattr(c, "_experts_implementation_internal")}
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


def untapped(logits: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that a tapped forward pass left in the autograd graph."""
    names = {id(p): name for name, p in parameters.items()}
    found: set[str] = set()
    seen: set[Node] = set()
    open_nodes = [logits.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            found.add(name)
        open_nodes += [following for following, _ in node.next_functions]
    return found

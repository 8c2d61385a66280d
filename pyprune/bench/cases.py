"""What is measured: each case is a kernel's call, the same in eager PyTorch, and the least work that it must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyprune import ops
from pyprune.bench.measure import Work, check_memory
from pyprune.bench.shapes import SHAPES
from pyprune.ops import reference

SAMPLES, TOKENS = 10, 128  # LLM-Pruner's calibration
KEPT = 0.75  # of heads and FFN channels
MANY, MANY_SIZE = 4096, 16
MOMENT_TOKENS = {"cuda": 2048, "cpu": 256}  # of each of eight samples


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        op: name.
        work: bytes that must be read and written, or operations.
        unit: ``GB/s`` or ``TFLOP/s``, which also says which ceiling holds.
        ours: one call on all tensors; None with ``missing``, the reason.
        host: the time that the host takes is what is measured.
        eager: the formula in stock PyTorch for one tensor; runs on each of ``arguments`` in turn.
    """

    op: str
    work: int
    unit: str
    ours: Work | None
    eager: Callable[..., Any]
    arguments: list[tuple[Any, ...]]
    missing: str = ""
    host: bool = False

    def stock(self, function: Callable[..., Any]) -> Work:
        """``function``, the eager formula or a compiled form of it, on all tensors."""
        return lambda: [function(*a) for a in self.arguments]


def salience_cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Row and column sums of all matrices of the model, one call."""
    shapes, size = SHAPES[name], dtype.itemsize
    elements = shapes.elements()
    largest = max(rows * cols for rows, cols in shapes.matrices())
    check_memory("salience", name, elements * (size + max(size, 4)) + 3 * largest * 4, device)
    weights = [_random(s, dtype, device) for s in shapes.matrices()]
    yield _salience_case("salience abs(w*g)", "taylor_abs", taylor_sums, weights, dtype)
    yield _salience_case("salience w^2*h", "fisher", fisher_sums, weights, torch.float32)


def many_cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """More tensors than a model has, each so small that the host's part of a call is what takes the time."""
    weights = [_random((MANY_SIZE, MANY_SIZE), dtype, device) for _ in range(MANY)]
    for op, prepared in (("salience", False), ("prepared salience", True)):
        label = f"{op} of {MANY} x [{MANY_SIZE}, {MANY_SIZE}]"
        yield replace(_salience_case(label, "taylor_abs", taylor_sums, weights, dtype, prepared), host=True)


def _salience_case(
    op: str,
    formula: str,
    eager: Callable[..., Any],
    weights: list[Tensor],
    dtype: torch.dtype,
    prepared: bool = False,
) -> Case:
    """``dtype`` is that of what stands beside the weights: gradients or curvatures."""
    partners = [_random(w.shape, dtype, w.device) for w in weights]
    which = "grads" if reference.FORMULAS[formula].needs_grad else "curvatures"
    work = sum(w.numel() * (w.itemsize + dtype.itemsize) for w in weights)
    arguments = list(zip(weights, partners, strict=True))
    if prepared:
        return Case(op, work, "GB/s", ops.prepare_salience(formula, weights, **{which: partners}), eager, arguments)
    return Case(op, work, "GB/s", lambda: ops.salience(formula, weights, **{which: partners}), eager, arguments)


def slice_cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Three quarters of the KV heads and of the FFN channels, drawn at random, of all layers, one call."""
    shapes, size = SHAPES[name], dtype.itemsize
    check_memory("slice", name, 3 * shapes.elements() * size, device)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)[: max(1, int(count * KEPT))].sort().values

    def spread(heads: Tensor, width: int) -> Tensor:
        return (heads[:, None] * width + torch.arange(width)).flatten()

    tensors: list[Tensor] = []
    kept: list[tuple[int, Tensor]] = []
    for _ in range(shapes.layers):
        heads, channels = drawn(shapes.kv_heads), drawn(shapes.ffn)
        queries = spread(heads, shapes.head_dim * shapes.heads // shapes.kv_heads)
        keys = spread(heads, shapes.head_dim)
        cuts = {
            "q": (0, queries), "k": (0, keys), "v": (0, keys), "o": (1, queries), "gate": (0, channels),
            "up": (0, channels), "down": (1, channels),
        }  # fmt: skip
        tensors += [_random(shape, dtype, device) for shape in shapes.layer().values()]
        kept += [cuts[part] for part in shapes.layer()]
    for dims, label in (((0,), "rows"), ((1,), "columns"), ((0, 1), "rows and columns")):
        chosen = [i for i, (dim, _) in enumerate(kept) if dim in dims]
        sources = [tensors[i] for i in chosen]
        work = sum(2 * tensors[i].numel() // tensors[i].shape[kept[i][0]] * len(kept[i][1]) * size for i in chosen)
        yield Case(
            f"slice {label}", work, "GB/s", _gather(sources, [{kept[i][0]: kept[i][1]} for i in chosen]),
            kept_slices, [(tensors[i], kept[i][0], kept[i][1].to(device)) for i in chosen],
        )  # fmt: skip


def moments_cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Channel sums of eight samples of activations, at the widths of the residual stream and of the FFN."""
    shapes, size, tokens = SHAPES[name], dtype.itemsize, MOMENT_TOKENS[device.type]
    check_memory("moments", name, 8 * tokens * shapes.ffn * (2 * size + 3 * 4), device)
    for width in (shapes.hidden, shapes.ffn):
        a, b = (_random((8, tokens, width), dtype, device) for _ in range(2))
        flat = a.flatten(0, 1)
        yield _optional("channel_moments", f"moments of {width} channels", flat.numel() * size, (flat,), moment_sums)
        yield _optional("channel_dots", f"dots of {width} channels", 2 * a.numel() * size, (a, b), dot_sums)


def activations_cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Salience of one decoder layer's weights from 10 samples of 128 tokens."""
    shapes, size = SHAPES[name], dtype.itemsize
    matrices = list(shapes.layer().values())
    widths = sum(rows + cols for rows, cols in matrices)
    largest = max(rows * cols for rows, cols in matrices)
    needed = sum(rows * cols for rows, cols in matrices) * size + SAMPLES * TOKENS * widths * size + 4 * largest * 4
    check_memory("activations", name, needed, device)
    arguments = [
        (
            _random((SAMPLES, TOKENS, cols), dtype, device), _random((SAMPLES, TOKENS, rows), dtype, device),
            _random((rows, cols), dtype, device),
        )
        for rows, cols in matrices
    ]  # fmt: skip
    work = sum(2 * rows * cols * SAMPLES * TOKENS for rows, cols in matrices)
    for formula, eager in (
        ("taylor_abs", taylor_from_activations), ("fisher", fisher_from_activations), ("mixed", mixed_from_activations),
    ):  # fmt: skip
        yield Case(f"activations {formula}", work, "TFLOP/s", _activations(formula, arguments), eager, arguments)


CASES: dict[str, Callable[[str, torch.dtype, torch.device], Iterator[Case]]] = {
    "salience": salience_cases,
    "many": many_cases,
    "slice": slice_cases,
    "moments": moments_cases,
    "activations": activations_cases,
}


def taylor_sums(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return _sums((w * g).abs())


def fisher_sums(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return _sums(w * w * h)


def kept_slices(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return tensor.index_select(dim, index)


def moment_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(0, dtype=torch.float32), x.float().square().sum(0)


def dot_sums(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, dtype=torch.float32)


def taylor_from_activations(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return _sums((w * (dy.flatten(0, 1).T @ x.flatten(0, 1))).abs())


def fisher_from_activations(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return _sums(w * w * _gradients(x, dy)[1])


def mixed_from_activations(x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    g, h = _gradients(x, dy)
    return _sums((w * g - 0.5 * (w * w * h)).abs())


def _gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the samples' gradients and of their squares, float32, one sample's gradient at a time."""
    g = torch.zeros(dy.shape[2], x.shape[2], dtype=torch.float32, device=x.device)
    h = torch.zeros_like(g)
    for i in range(x.shape[0]):
        each = (dy[i].T @ x[i]).float()
        g += each
        h += each * each
    return g, h


def _sums(element: Tensor) -> tuple[Tensor, Tensor]:
    return element.sum(1, dtype=torch.float32), element.sum(0, dtype=torch.float32)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def _gather(tensors: list[Tensor], indices: list[dict[int, Tensor]]) -> Work:
    return lambda: ops.gather(tensors, indices)


def _activations(formula: str, arguments: list[tuple[Tensor, Tensor, Tensor]]) -> Work:
    return lambda: [ops.activation_salience(x, dy, w, formula) for x, dy, w in arguments]


def _optional(op: str, label: str, work: int, arguments: tuple[Tensor, ...], eager: Callable[..., Any]) -> Case:
    function = getattr(ops, op, None)
    missing = "" if function else f"pyprune.ops has no {op}"
    ours = (lambda: function(*arguments)) if function else None
    return Case(label, work, "GB/s", ours, eager, [arguments], missing)

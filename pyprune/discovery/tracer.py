"""The tracer: a dispatch mode that records nothing but what each tensor dimension is.

Every tensor carries an :class:`Info`, kept in a weak map by identity: an :class:`~pyprune.discovery.axes.Axis` for each
dimension plus a few facts that roles and exactness are decided on. Each op is handed to the rule registered for it
(:mod:`pyprune.discovery.rules`); an op with no rule freezes what it touches.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.discovery import axes as ax
from pyprune.discovery.axes import Axis, Mismatch
from pyprune.discovery.rules import find_rule

_SILENT = frozenset({"device", "_local_scalar_dense", "is_nonzero", "_assert_async", "_assert_tensor_metadata"})
# Ops whose rules know what integers that point into an axis mean; any other arithmetic with them freezes the axis.
_POINTER_OPS = frozenset(
    "index _unsafe_index index_select index_put gather scatter scatter_add scatter_reduce index_add index_copy one_hot "
    "select_expert histc bincount new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like "
    "new_empty_strided _assert_async _assert_tensor_metadata device is_nonzero".split()
)
_COMPARISONS = frozenset("eq ne lt le gt ge".split())
_NONE: frozenset[Any] = frozenset()
TABLE = "table: "
"""Start of the mark of an axis that met values computed by position along it; the rest says by what."""


@dataclass(slots=True)
class Info:
    """What is known of a tensor.

    Attributes:
        axes: one a dimension.
        zero: for each dimension, whether masking a unit of its axis (zeroing the parameters' slices) makes the tensor's
            slice zero. A reduction over a dimension where this holds is the same after slicing as after masking.
        active: depends on the model's input (a weight or a table computed from positions does not).
        source: (parameter name, its dimension for each dimension here) for a parameter and plain relabellings of it.
        root: the Info that stands for the memory, of a tensor that shares it: in-place writes are noted there.
        writes: of a root, how many writes there were; else, how many of the root's this Info allows for.
        scores: (contracted axis, batch axes) of products of two active tensors, until a softmax makes them attention.
        attention: attention probabilities: the result of that softmax.
        values: for an integer tensor, the axis that its values point into.
        skips: blocks whose input reaches this tensor through additions alone: residual paths.
        made: computed from nothing but sizes and positions (a mask, ALiBi slopes): no weight stands behind it.
    """

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]
    active: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    root: Info | None = None
    writes: int = 0
    scores: tuple[tuple[Axis, tuple[Axis, ...]], ...] = ()
    attention: bool = False
    values: Axis | None = None
    skips: frozenset[int] = _NONE
    made: bool = False


@dataclass
class Problem:
    """An op that froze axes: for the warning, once an op and module."""

    op: str
    module: str
    axes: list[Axis] = field(default_factory=list)


class Call:
    """One op as a rule sees it: arguments by schema name, results, and the verbs that relate axes."""

    __slots__ = ("args", "func", "name", "out", "tensors", "tracer")

    def __init__(self, tracer: Tracer, func: Any, name: str, args: dict[str, Any], out: Any) -> None:
        self.tracer, self.func, self.name, self.args, self.out = tracer, func, name, args, out
        # Every tensor among the arguments, in order.
        self.tensors = [t for a in args.values() if a is not None for t in iter_tensors(a)]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or ``default`` when this overload has none of that name."""
        return self.args.get(name, default)

    def info(self, value: str | torch.Tensor) -> Info:
        """The Info of an argument (by name) or of a tensor."""
        return self.tracer.info(self.args[value] if isinstance(value, str) else value)

    @property
    def where(self) -> str:
        return f"aten.{self.name} in {self.tracer.module or 'the model'}"

    def unify(self, a: Axis, b: Axis) -> None:
        """The two axes are one; without a common refinement both are frozen."""
        try:
            ax.unify(a, b)
        except Mismatch as error:
            self.freeze(a, f"no common structure ({error})")
            self.freeze(b, f"no common structure ({error})")

    def join(self, axis: Axis, info: Info, dim: int, made: bool) -> None:
        """``axis``, of a tensor that is ``made`` or not, meets dimension ``dim`` of ``info`` elementwise.

        They are one, except where a made tensor has values by position along it: then every layer that meets the table
        may keep other units than the next, and removal is right only if each keeps the values of its own.
        """
        other = info.axes[dim]
        if made != info.made:
            table, met = (axis, other) if made else (other, axis)
            reason = next((a.frozen for a in ax.atoms(table) if a.frozen is not None), None)
            if reason is not None:
                ax.mark(met, TABLE + reason)
                return
        self.unify(axis, other)

    def freeze(self, axis: Axis, problem: str) -> None:
        """Forbid removal along ``axis``, naming this op."""
        ax.freeze(axis, f"{problem} by {self.where}")

    def fresh(self, size: int, problem: str | None = None) -> Axis:
        """A new axis, frozen when a problem is given."""
        axis = ax.atom(size)
        if problem is not None:
            self.freeze(axis, problem)
        return axis

    def reduced(self, info: Info, dim: int, size_dependent: bool) -> None:
        """Dimension ``dim`` is summed away; note what that means for exactness."""
        ax.mark(info.axes[dim], "summed")
        if size_dependent:
            ax.mark(info.axes[dim], "size")
        elif not info.zero[dim]:
            ax.mark(info.axes[dim], "nonzero")

    def dims(self, name: str, rank: int) -> list[int]:
        """Argument ``name`` as non-negative dimensions; missing or empty means all."""
        value = self.args.get(name)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return list(range(rank))
        items = value if isinstance(value, (list, tuple)) else [value]
        return [int(d) % rank if rank else 0 for d in items]


def iter_tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in nested lists, tuples, mappings and objects that are mappings (model outputs), in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in iter_tensors(item)]


class _Infos:
    """Infos of living tensors, by identity. A lookup is in the path of every op, so it is one of a plain dictionary."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[torch.Tensor], Info]] = {}

    def get(self, tensor: torch.Tensor) -> Info | None:
        found = self._found.get(id(tensor))
        return None if found is None else found[1]

    def put(self, tensor: torch.Tensor, info: Info) -> None:
        key, found = id(tensor), self._found
        found[key] = (weakref.ref(tensor, lambda _: found.pop(key, None)), info)


class Tracer(TorchDispatchMode):
    """Labels every tensor an op makes.

    Attributes:
        module: dotted path of the module that is running.
        uses: (parameter name, dimension) -> how it was used: ``"produced"``, ``"contracted"``, ``"lookup"``.
        seen: the distinct axis tuples of all tensors, for deciding which axes always stand together.
        touched: names of parameters that an op read.
        products: (contracted, left, right) axes of every product of two active tensors.
        problems: ops that had no rule.
        numbers: (op, number) of every float that an op is called with, single numbers that become tensors included.
        ranked: (axis, k) of every choice of the ``k`` best along an axis.
        rotate: overwrite every such choice by a round robin, so that few tokens reach all experts. Only what tensors
            are is recorded, so any choice will do.
    """

    def __init__(self, rotate: bool = False, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.rotate = rotate
        self._run = run
        self.numbers: set[tuple[str, float]] = set()
        self.ranked: list[tuple[Axis, int]] = []
        self.module = ""
        self.uses: dict[tuple[str, int], set[str]] = {}
        self.seen: dict[tuple[int, ...], tuple[Axis, ...]] = {}
        self.touched: set[str] = set()
        self.problems: dict[tuple[str, str], Problem] = {}
        self.products: list[tuple[Axis, Axis, Axis]] = []
        self.paused = False
        # Whether any tensor so far points into an axis.
        self._pointers = False
        self._infos = _Infos()
        self._schemas: dict[Any, tuple[str, dict[str, Any], Callable[[Call], Any] | None]] = {}

    # -- labels ------------------------------------------------------------------------------------------------------
    def info(self, tensor: torch.Tensor) -> Info:
        """The tensor's Info. One that no op made and nobody registered is a constant: its axes are frozen."""
        found = self._infos.get(tensor)
        if found is None:
            found = Info(tuple(ax.atom(n) for n in tensor.shape), (False,) * tensor.dim(), made=True)
            for axis in found.axes:
                ax.freeze(axis, "meets a tensor that is neither a parameter nor a buffer of the model")
            self._infos.put(tensor, found)
        elif found.source is not None and found.root is None:
            self.touched.add(found.source[0])
        root = found.root
        if root is not None and found.writes != root.writes:
            # Written in place through another tensor of the same memory: what was known of the values holds no more.
            found.zero, found.skips, found.writes = (False,) * len(found.zero), _NONE, root.writes
            found.made, found.active = found.made and root.made, found.active or root.active
        return found

    def label(self, tensor: torch.Tensor, info: Info) -> None:
        """Attach ``info``; the axes' sizes must be the tensor's."""
        axes = info.axes
        sizes = tuple([a.size for a in axes])
        if sizes != tensor.shape:
            raise AssertionError(f"axes {sizes} for a tensor of shape {tuple(tensor.shape)} in {self.module}")
        if info.root is not None:
            info.writes = info.root.writes
        # A dimension of size one has no units to mask: it is zero wherever they are, vacuously.
        info.zero = tuple([z or n == 1 for z, n in zip(info.zero, sizes, strict=True)])
        self._infos.put(tensor, info)
        self.seen.setdefault(tuple([id(ax.find(a)) for a in axes]), axes)

    def use(self, info: Info, dim: int, how: str) -> None:
        """Note how a parameter's dimension is used, when ``info`` is a parameter or a relabelling of one."""
        if info.source is not None and info.source[1][dim] >= 0:
            self.uses.setdefault((info.source[0], info.source[1][dim]), set()).add(how)

    # -- dispatch ----------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {}) if self._run is not None else func(*args, **(kwargs or {}))
        if self.rotate and func is torch.ops.aten.topk.default:
            _rotate(out[1], args[0], args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1))
        if not self.paused:
            self.apply(func, args, kwargs or {}, out)
        return out

    def _schema(self, func: Any) -> tuple[str, dict[str, Any], Callable[[Call], Any] | None]:
        entry = self._schemas.get(func)
        if entry is None:
            name = func._schema.name.split("::")[1]
            defaults = {a.name: a.default_value if a.has_default_value() else None for a in func._schema.arguments}
            entry = self._schemas[func] = (name, defaults, find_rule(func, name))
        return entry

    def apply(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Label the results of one op."""
        name, defaults, rule = self._schema(func)
        if name in _SILENT:
            if name == "_local_scalar_dense":
                self._freeze_pointed(Call(self, func, name, {"self": args[0]}, None))
            return
        bound = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        self.numbers |= {(name, value) for value in bound.values() if type(value) is float}
        if name == "lift_fresh" and args[0].dim() == 0 and args[0].device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # a fake tensor has no value
                self.numbers.add((name, float(args[0].item())))
        self.run_rule(rule, Call(self, func, name, bound, out))

    def run_rule(self, rule: Callable[[Call], Any] | None, call: Call) -> None:
        """Let ``rule`` label the results of ``call``; without one, freeze."""
        results = iter_tensors(call.out)
        if not results:
            return
        found = None
        if rule is not None:
            try:
                found = rule(call)
            except Mismatch as error:
                found = self._frozen(call, results, f"no common structure ({error})")
        if found is None:
            problem = self.problems.setdefault((call.name, self.module), Problem(call.name, self.module))
            problem.axes += [a for t in call.tensors for a in self.info(t).axes]
            found = self._frozen(call, results, "no rule for it: frozen")
        infos: Sequence[Info] = [found] if isinstance(found, Info) else found
        if any([i.values is not None for i in infos]):
            self._pointers = True
        elif self._pointers:
            self._freeze_pointed(call)
        before = self._infos.get(results[0])
        made = all([self.info(t).made for t in call.tensors])
        for tensor, info in zip(results, infos, strict=True):
            info.made = made
            self.label(tensor, info)
        if before is not None and call.name.endswith("_"):
            root, now = before.root or before, self.info(results[0])
            root.made, root.active, root.skips = root.made and now.made, root.active or now.active, _NONE
            if call.name != "zero_":
                root.zero = (False,) * len(root.zero)
                root.writes += 1
            now.root, now.writes = root, root.writes

    def _freeze_pointed(self, call: Call) -> None:
        """Numbers that point into an axis were used as numbers: its indices are not interchangeable."""
        name = call.name.removesuffix("_")
        if name in _POINTER_OPS:
            return
        for tensor in call.tensors:
            info = self._infos.get(tensor)
            if info is None or info.values is None:
                continue
            other = call.get("other")
            size = ax.without_sentinel(info.values).size
            outside = isinstance(other, (int, float)) and not 0 <= other < size
            if not (name in _COMPARISONS and outside):
                call.freeze(info.values, "is pointed into by numbers that are computed with")

    def _frozen(self, call: Call, results: list[torch.Tensor], problem: str) -> list[Info]:
        inputs = [self.info(t) for t in call.tensors]
        for info in inputs:
            for axis in info.axes:
                call.freeze(axis, problem)
        active = any(i.active for i in inputs)
        return [
            Info(tuple(call.fresh(n, problem) for n in t.shape), (False,) * t.dim(), active=active) for t in results
        ]


def _rotate(indices: torch.Tensor, ranked: torch.Tensor, dim: int) -> None:
    """Every choice of the best ``k`` of ``n`` becomes the next ``k`` in turn, in place."""
    last = indices.movedim(dim, -1)
    turn = torch.arange(last.numel(), device=last.device) % ranked.shape[dim]
    last.copy_(turn.view(last.shape))

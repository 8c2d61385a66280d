"""``discover``: from one traced run to groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from pyprune.discovery import axes as ax
from pyprune.discovery.axes import Axis
from pyprune.discovery.groups import Group, Groups, IndexMap, Member
from pyprune.discovery.lattice import Occurrences, lattice
from pyprune.discovery.roles import HEADS, PER_HEAD, Leaf, assign
from pyprune.discovery.run import Block, Trace, trace, unwrap
from pyprune.discovery.tracer import TABLE

# Marks of axes along which a sum after slicing is not the sum after masking.
_INEXACT = frozenset({"size", "nonzero"})
# Marks of axes whose values went on into something.
_READ = frozenset({"contracted", "mixed", "qk", "vo", "heads", "output", "size", "nonzero", "summed"})


def discover(model: nn.Module, example_inputs: Any = None) -> Groups:
    """Find everything in ``model`` that can be removed together.

    The model runs once without data (its weights may be on the meta device) and is left exactly as it was. Hooks are
    not run; a ``torch.compile`` wrapper is looked through.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. None makes a few token ids,
            ``[3, 11]`` int64, for models that take ``input_ids`` or have an embedding.

    Returns:
        The groups in model order, frozen ones included. ``exact`` says that slicing a unit away equals zeroing its
        slices, with every Python number of the model (the attention scale) as it was.

    Raises:
        PyPruneError: the model cannot run on the inputs, takes none of the default ones, or is quantised.
    """
    return _Builder(trace(unwrap(model), example_inputs)).build()


class _Builder:
    def __init__(self, result: Trace) -> None:
        self.trace = result
        self.places = Occurrences()
        self.order = {name: i for i, name in enumerate(result.shapes)}
        self.lists = self._block_lists()
        self.experts = [path for path, found in result.blocks.items() if any(_chosen(b) for b in found)]

    def build(self) -> Groups:
        self._freeze_outputs()
        for blocks in self.lists.values():
            for axis in (a for b in blocks for a in b.given):
                ax.mark(axis, "stream")
        leaves = self._leaves()
        assign(leaves, self.trace.tracer.uses, self._layer_of, self._in_expert)
        self._freeze_unusable(leaves)
        tables = self._freeze_tables(leaves)
        outers = self._outers(leaves)
        drafts: list[tuple[tuple[int, int, int], Group, Leaf | None]] = [
            (self._first_place(leaf), self._group(leaf, outers.get(id(leaf.axis)), id(leaf.axis) in tables), leaf)
            for leaf in leaves
        ]
        drafts += [((self._first_tensor(g.modules[0]), -1, 0), g, None) for g in self._layer_groups()]
        drafts.sort(key=lambda d: d[0])
        names = _names([g for _, g, _ in drafts])
        of_axis = {id(leaf.axis): name for (_, _, leaf), name in zip(drafts, names, strict=True) if leaf is not None}
        groups = []
        for (_, group, leaf), name in zip(drafts, names, strict=True):
            outer = None if leaf is None else outers.get(id(leaf.axis))
            groups.append(replace(group, name=name, within=None if outer is None else of_axis[id(outer.axis)]))
        return Groups(
            groups=groups,
            shapes=dict(self.trace.shapes),
            parameters=frozenset(self.trace.parameters),
            embeddings=self._embeddings(leaves),
            tied=dict(self.trace.tied),
            warnings=self._warnings(leaves),
        )

    # -- leaves ------------------------------------------------------------------------------------------------------
    def _freeze_outputs(self) -> None:
        for info in self.trace.outputs:
            for axis in info.axes:
                ax.freeze(axis, "is a dimension of the model's output")
            if info.axes:
                ax.mark(info.axes[-1], "output")

    def _leaves(self) -> list[Leaf]:
        """Leaves that lie in a parameter, in model order."""
        found: dict[int, Leaf] = {}
        for name, axes in self.trace.tensors.items():
            for dim, axis in enumerate(axes):
                for occurrence in self.places.of(axis):
                    leaf = found.setdefault(id(occurrence.leaf), Leaf(occurrence.leaf))
                    leaf.places.setdefault((name, dim), []).append(occurrence)
        return [x for x in found.values() if any(name in self.trace.parameters for name, _ in x.places)]

    def _freeze_unusable(self, leaves: list[Leaf]) -> None:
        unreached = [n for n in self.trace.shapes if n in self.trace.parameters - self.trace.tracer.touched]
        for leaf in leaves:
            if any(o.square for found in leaf.places.values() for o in found):
                ax.freeze(leaf.axis, "stands in a product with itself")
            if "ranked" in leaf.axis.marks and "routed" not in leaf.axis.marks:
                ax.freeze(leaf.axis, "is ranked by value")
            if leaf.role == "experts" and not self._holds_experts(leaf):
                ax.freeze(leaf.axis, "is ranked by a router, and no weights of experts were seen along it")
            if leaf.role == "experts" and self._inner_experts(leaf, leaves):
                ax.freeze(leaf.axis, "is a group of experts that the router ranks as one")
            if leaf.role == "experts" and self._min_units(leaf) >= leaf.axis.size:
                ax.freeze(leaf.axis, "has no more experts than its router chooses")
            if "produced" in leaf.axis.marks and not leaf.axis.marks & _READ:
                ax.freeze(leaf.axis, "is produced, and nothing reads it on the example inputs")
            names = [name for name, _ in leaf.places]
            module = _common_module(names)
            for name in unreached:
                if name in names:
                    ax.freeze(leaf.axis, "is not reached by the example inputs")
                elif _inside(name, module) and leaf.axis.size in self.trace.shapes[name]:
                    ax.freeze(leaf.axis, f"may lie in {name} too, which the example inputs do not reach")

    def _holds_experts(self, leaf: Leaf) -> bool:
        """Something that maps one axis to another lies along ``leaf``: the router itself has the hidden one only."""
        for name, _ in leaf.places:
            beside = {id(a): a for axis in self.trace.tensors[name] for a in ax.atoms(axis)}
            if sum(not a.marks & {"ranked", "routed"} for a in beside.values()) >= 2:
                return True
        return False

    def _freeze_tables(self, leaves: list[Leaf]) -> set[int]:
        """Freeze leaves that met a table computed by position; those that nothing else froze, by identity."""
        only = set()
        for leaf in leaves:
            reason = next((m.removeprefix(TABLE) for m in sorted(leaf.axis.marks) if m.startswith(TABLE)), None)
            if reason is not None and leaf.axis.frozen is None:
                ax.freeze(leaf.axis, f"meets a table {reason}")
                only.add(id(leaf.axis))
        return only

    def _inner_experts(self, leaf: Leaf, leaves: list[Leaf]) -> set[int]:
        """The expert axes inside ``leaf``, where experts come in groups."""
        others = {id(x.axis) for x in leaves if x.role == "experts" and x is not leaf}
        inner = set()
        for found in leaf.places.values():
            for o in found:
                inner |= {id(a) for _, stride, a in o.spread if id(a) in others and stride < o.stride}
        return inner

    # -- outer axes --------------------------------------------------------------------------------------------------
    def _outers(self, leaves: list[Leaf]) -> dict[int, Leaf]:
        """For each per-head leaf, the head axis it stands with in every tensor of the model and of the run."""
        heads = {id(x.axis): x for x in leaves if x.role in HEADS}
        candidates = {id(x.axis): set(heads) - {id(x.axis)} for x in leaves if x.role in PER_HEAD}
        for leaf in leaves if any(x.role == "experts" for x in leaves) else ():
            for inner in self._inner_experts(leaf, leaves) if leaf.role == "experts" else ():
                heads[id(leaf.axis)] = leaf
                candidates.setdefault(inner, set()).add(id(leaf.axis))
        for leaf in leaves:
            if id(leaf.axis) in candidates:
                for found in leaf.places.values():
                    for o in found:
                        candidates[id(leaf.axis)] &= o.companions
        for axes in self.trace.tracer.seen.values():
            for dim, axis in enumerate(axes):
                others = {id(f) for d, a in enumerate(axes) if d != dim for f in ax.factors(a)}
                for o in self.places.of(axis):
                    if candidates.get(id(o.leaf)):
                        candidates[id(o.leaf)] &= o.companions | others
        for contracted, left, right in self.trace.tracer.products:
            # Every index of the shared axis meets every other one, so units must be the same in all of them.
            shared = {id(a) for a in ax.atoms(left)} & {id(a) for a in ax.atoms(right)}
            for a in ax.atoms(contracted):
                if id(a) in candidates:
                    candidates[id(a)] -= shared
        rank = {i: n for n, i in enumerate(heads)}
        return {i: heads[min(found, key=rank.__getitem__)] for i, found in candidates.items() if found}

    # -- groups ------------------------------------------------------------------------------------------------------
    def _group(self, leaf: Leaf, outer: Leaf | None, table: bool) -> Group:
        members = tuple(self._members(leaf, outer))
        names = [m.tensor for m in members]
        layers = {self._layer_of(n) for n in names}
        layer = next(iter(layers)) if len(layers) == 1 else None
        frozen = leaf.axis.frozen
        if frozen is not None:
            frozen = f"{next(m.tensor for m in members if m.parameter)}: {frozen}"
        return Group(
            name="",
            role=leaf.role,
            module=_common_module(names),
            layer=None if layer is None else layer[1],
            units=leaf.axis.size,
            members=members,
            outer=1 if outer is None else outer.axis.size,
            exact=not leaf.axis.marks & (_INEXACT | {"scaled"} if leaf.role == "state" else _INEXACT),
            frozen=frozen,
            table=table,
            min_units=self._min_units(leaf),
        )

    def _min_units(self, leaf: Leaf) -> int:
        """How many units the choices of the best ``k`` along the axis need."""
        least = 1
        for axis, k in self.trace.tracer.ranked:
            if any(a is leaf.axis for a in ax.atoms(axis)):
                least = max(least, -(-k * leaf.axis.size // axis.size))
        return least

    def _members(self, leaf: Leaf, outer: Leaf | None) -> Iterable[Member]:
        copies = 1 if outer is None else outer.axis.size
        for (name, dim), found in leaf.places.items():
            terms = sorted((lattice(o, None if outer is None else outer.axis) for o in found), key=lambda t: t.offset)
            index = IndexMap(copies, leaf.axis.size, tuple(terms))
            yield Member(name, dim, index, name in self.trace.parameters, self.trace.shapes[name][dim])

    def _first_place(self, leaf: Leaf) -> tuple[int, int, int]:
        (name, dim), found = min(leaf.places.items(), key=lambda item: (self.order[item[0][0]], item[0][1]))
        # The outer factor of a product comes before the inner one.
        return self.order[name], dim, min(o.offset for o in found) - max(o.stride for o in found)

    def _first_tensor(self, module: str) -> int:
        return min((i for n, i in self.order.items() if _inside(n, module)), default=len(self.order))

    # -- blocks ------------------------------------------------------------------------------------------------------
    def _block_lists(self) -> dict[str, list[Block]]:
        """Outermost lists of blocks that return a tensor with the axes of the one they take."""
        found = {}
        for path, blocks in self.trace.blocks.items():
            same = all(len(b.given) > 0 and _same(b.given, b.returned) for b in blocks)
            if same and len({b.path for b in blocks}) == len(blocks):
                found[path] = blocks
        return {p: b for p, b in found.items() if not any(p != q and _inside(p, q) for q in found)}

    def _layer_of(self, tensor: str) -> tuple[str, int] | None:
        for path in self.lists:
            if _inside(tensor, path):
                return path, int(tensor[len(path) + 1 if path else 0 :].split(".", 1)[0])
        return None

    def _in_expert(self, tensor: str) -> bool:
        """Whether ``tensor`` lies in one of a list of modules that see only the tokens chosen for them."""
        return any(_inside(tensor, path) for path in self.experts)

    def _layer_groups(self) -> Iterable[Group]:
        for path, blocks in self.lists.items():
            modules = tuple(b.path for b in blocks)
            frozen = None if len(modules) > 1 else f"{path}: has a single block"
            yield Group(
                name="", role="layers", module=path, layer=None, units=len(modules), members=(),
                exact=all(b.residual for b in blocks), frozen=frozen, modules=modules,
            )  # fmt: skip

    # -- the rest ----------------------------------------------------------------------------------------------------
    def _embeddings(self, leaves: list[Leaf]) -> frozenset[str]:
        """Tables looked up by index, and what produces the vocabulary."""
        names = {name for (name, _), how in self.trace.tracer.uses.items() if "lookup" in how}
        for leaf in leaves:
            if leaf.role == "vocab" and "output" in leaf.axis.marks:
                names |= {name for name, _ in leaf.places}
        return frozenset(names & self.trace.parameters)

    def _warnings(self, leaves: list[Leaf]) -> list[str]:
        """Ops without a rule that cost something, once an op."""
        holders = {id(x.axis): [n for n, _ in x.places if n in self.trace.parameters] for x in leaves}
        texts: dict[str, str] = {}
        for problem in self.trace.tracer.problems.values():
            names = {n for axis in problem.axes for a in ax.atoms(axis) for n in holders.get(id(a), ())}
            if names and problem.op not in texts:
                shown = ", ".join(sorted(names, key=self.order.__getitem__)[:3]) + (", ..." if len(names) > 3 else "")
                texts[problem.op] = (
                    f"no rule for aten.{problem.op} (in {problem.module or 'the model'}): "
                    f"the dimensions it touches are left whole, in {shown}"
                )
        return list(texts.values())


def _same(a: tuple[Axis, ...], b: tuple[Axis, ...]) -> bool:
    return len(a) == len(b) and all(ax.find(x) is ax.find(y) for x, y in zip(a, b, strict=True))


def _chosen(block: Block) -> bool:
    return any("chosen" in a.marks for axis in block.given for a in ax.atoms(axis))


def _inside(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def _common_module(tensors: list[str]) -> str:
    """The smallest module that holds all of them."""
    paths = [n.split(".")[:-1] for n in tensors]
    common = paths[0]
    for path in paths[1:]:
        length = next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), None)
        common = common[: min(len(common), len(path)) if length is None else length]
    return ".".join(common)


def _names(groups: list[Group]) -> list[str]:
    """``module:role``, numbered from the second of the same on."""
    seen: dict[str, int] = {}
    out = []
    for group in groups:
        base = f"{group.module}:{group.role}"
        seen[base] = seen.get(base, 0) + 1
        out.append(base if seen[base] == 1 else f"{base}.{seen[base]}")
    return out

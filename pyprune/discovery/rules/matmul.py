"""Matrix products: the contracted pair is one axis, outputs inherit the rest."""

from __future__ import annotations

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


def contract(call: Call, a: Info, b: Info) -> Info:
    """Info of ``a @ b`` for ``a`` [*batch, M, K] and ``b`` [*batch, K, N] with as many batch dimensions each."""
    batch = len(a.axes) - 2
    for d in range(batch):
        call.unify(a.axes[d], b.axes[d])
    m, k, n = a.axes[-2], a.axes[-1], b.axes[-1]
    call.unify(k, b.axes[-2])
    if not (a.zero[-1] or b.zero[-2]):
        ax.mark(k, "nonzero")
    tracer = call.tracer
    scores: tuple[tuple[ax.Axis, tuple[ax.Axis, ...]], ...] = ()
    if a.active and b.active:
        tracer.products.append((k, m, n))
        ax.mark(k, "mixed")
        if a.attention or b.attention:
            ax.mark(n if a.attention else m, "vo")
            for d in range(batch):
                ax.mark(a.axes[d], "heads")
        else:
            scores = ((k, a.axes[:batch]),)
    elif a.active or b.active:
        weight, produced, contracted = (b, len(b.axes) - 1, len(b.axes) - 2) if a.active else (a, batch, batch + 1)
        for dim, how in ((produced, "produced"), (contracted, "contracted")):
            ax.mark(weight.axes[dim], how)
            tracer.use(weight, dim, how)
        if any("chosen" in row.marks for row in ax.atoms(m if a.active else n)):
            ax.mark(weight.axes[produced], "sparse")
            ax.mark(weight.axes[contracted], "sparse")
    zero = (*(a.zero[d] or b.zero[d] for d in range(batch)), a.zero[-2], b.zero[-1])
    return Info((*a.axes[:batch], m, n), zero, active=a.active or b.active, scores=scores)


def add_bias(call: Call, out: Info, bias: Info) -> Info:
    """``out`` plus a bias that broadcasts to it."""
    zero = list(out.zero)
    offset = len(out.axes) - len(bias.axes)
    for d, axis in enumerate(out.axes):
        own = d - offset
        carried = own >= 0 and bias.axes[own].size == axis.size
        if carried:
            call.join(axis, bias, own, out.made)
            if out.made and not bias.made:
                out.axes = (*out.axes[:d], bias.axes[own], *out.axes[d + 1 :])
        zero[d] = zero[d] and carried and bias.zero[own]
    out.zero = tuple(zero)
    out.active = out.active or bias.active
    return out


@rule("mm", "bmm")
def matrix_product(call: Call) -> Info:
    return contract(call, call.info("self"), call.info("mat2"))


@rule("addmm")
def matrix_product_and_bias(call: Call) -> Info:
    return add_bias(call, contract(call, call.info("mat1"), call.info("mat2")), call.info("self"))


@rule("baddbmm")
def batched_product_and_bias(call: Call) -> Info:
    out = contract(call, call.info("batch1"), call.info("batch2"))
    bias = call.info("self")
    return out if call.get("beta", 1) == 0 else add_bias(call, out, bias)


def _column(info: Info) -> Info:
    source = None if info.source is None else (info.source[0], (*info.source[1], -1))
    return Info((*info.axes, ax.ONE), (*info.zero, False), active=info.active, source=source)


@rule("mv")
def matrix_vector(call: Call) -> Info:
    out = contract(call, call.info("self"), _column(call.info("vec")))
    return Info(out.axes[:1], out.zero[:1], active=out.active)


@rule("addmv")
def matrix_vector_and_bias(call: Call) -> Info:
    out = contract(call, call.info("mat"), _column(call.info("vec")))
    return add_bias(call, Info(out.axes[:1], out.zero[:1], active=out.active), call.info("self"))


@rule("dot", "vdot")
def inner_product(call: Call) -> Info:
    a, b = call.info("self"), call.info("other" if call.name == "vdot" else "tensor")
    call.unify(a.axes[0], b.axes[0])
    if not (a.zero[0] or b.zero[0]):
        ax.mark(a.axes[0], "nonzero")
    return Info((), (), active=a.active or b.active)


@rule("linear")
def linear(call: Call) -> Info:
    x, w = call.info("input"), call.info("weight")
    call.unify(x.axes[-1], w.axes[1])
    call.tracer.use(w, 1, "contracted")
    call.tracer.use(w, 0, "produced")
    ax.mark(w.axes[1], "contracted")
    ax.mark(w.axes[0], "produced")
    out = Info((*x.axes[:-1], w.axes[0]), (*x.zero[:-1], w.zero[0]), active=x.active or w.active)
    return out if call.get("bias") is None else add_bias(call, out, call.info("bias"))


@rule("outer", "ger")
def outer_product(call: Call) -> Info:
    a, b = call.info("self"), call.info("vec2")
    return Info((a.axes[0], b.axes[0]), (a.zero[0], b.zero[0]), active=a.active or b.active)

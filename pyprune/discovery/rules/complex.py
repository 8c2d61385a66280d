"""Complex numbers: a last dimension of two real ones becomes one, and back."""

from __future__ import annotations

from pyprune.discovery.rules import rule
from pyprune.discovery.rules.shape import relabel
from pyprune.discovery.tracer import Call, Info


@rule("view_as_complex")
def as_complex(call: Call) -> Info:
    """[..., 2] real -> [...] complex; neither half can go without the other."""
    info = call.info("self")
    call.freeze(info.axes[-1], "pairs real and imaginary parts")
    return relabel(info, info.axes[:-1], range(len(info.axes) - 1))


@rule("view_as_real")
def as_real(call: Call) -> Info:
    """[...] complex -> [..., 2] real."""
    info = call.info("self")
    pair = call.fresh(2, "pairs real and imaginary parts")
    # The pair has no units that could be masked.
    return relabel(info, (*info.axes, pair), (*range(len(info.axes)), -1), zero=(*info.zero, True))


@rule("real", "imag")
def part(call: Call) -> Info:
    info = call.info("self")
    return relabel(info, info.axes, range(len(info.axes)))


@rule("polar", "complex")
def assembled(call: Call) -> Info:
    """Two tensors of one shape, elementwise; zero where the modulus (or both parts) are."""
    names = ("abs", "angle") if call.name == "polar" else ("real", "imag")
    first, second = (call.info(n) for n in names)
    for a, b in zip(first.axes, second.axes, strict=True):
        call.unify(a, b)
    zero = tuple(a and (b or call.name == "polar") for a, b in zip(first.zero, second.zero, strict=True))
    return Info(first.axes, zero, active=first.active or second.active)

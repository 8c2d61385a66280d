"""The compiled ops are PyTorch operators, agree on every instruction set, and have a substitute where absent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fresh import PACKAGE, run_fresh
from helpers_ops import DEVICES, FLOATS, inputs
from torch.utils._pytree import tree_leaves

from pyprune import ops
from pyprune.ops import _native, reference

compiled = pytest.mark.skipif(not ops.backend_info()["native"], reason="the package was installed without a compiler")


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_salience(dtype: torch.dtype, device: str) -> None:
    weights, grads, curvatures = inputs([(5, 7), (3,), (2, 3, 4), (0, 4)], dtype, device)
    for code, lists in ((0, (weights, [], [])), (3, (weights, grads, [])), (5, (weights, grads, curvatures))):
        torch.library.opcheck(torch.ops.pyprune.salience.default, (*lists, code))


@compiled
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_accumulate_square(device: str) -> None:
    _, grads, curvatures = inputs([(5, 7), (3,)], torch.bfloat16, device)
    torch.library.opcheck(torch.ops.pyprune.accumulate_square_.default, (curvatures, grads, 0.5))


@compiled
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_gather(device: str) -> None:
    tensors = [torch.randn(5, 7, device=device), torch.randn(4, device=device)]
    out = [torch.empty(2, 7, device=device), torch.empty(3, device=device)]
    runs = torch.tensor([[0, 0, 1], [3, 1, 1], [1, 0, 3]])
    torch.library.opcheck(torch.ops.pyprune.gather.default, (tensors, runs, [2, -1, 1], out))


@compiled
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_opcheck_channels(dtype: torch.dtype) -> None:
    for shape in ((5, 7), (2, 5, 7), (2, 0, 3)):
        x = torch.ones(shape, dtype=dtype)
        torch.library.opcheck(torch.ops.pyprune.channel_moments.default, (x,))
        torch.library.opcheck(torch.ops.pyprune.channel_dots.default, (x, x))


@compiled
def test_the_compiled_dots_themselves_refuse_unequal_tensors() -> None:
    x = torch.ones(2, 5, 7)
    for other in (x[:1], x[:, :4], x[:, :, :6], x[0], x.double()):
        with pytest.raises(RuntimeError):
            torch.ops.pyprune.channel_dots(x, other)


def _accumulated(w: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    curvatures = [w * w, w + 1, w * 2]
    ops.accumulate_square_(curvatures, [g, w, g], 0.5)
    return curvatures


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "torch.ops": lambda w, g: torch.ops.pyprune.salience([w], [g], [], 3),
    "salience": lambda w, g: ops.salience("mixed", [w], [g], [g.square()]),
    "accumulate_square_": _accumulated,
    "activation_salience": lambda w, g: ops.activation_salience(w[None], g[None], torch.ones(5, 5), "fisher"),
    "channel_moments": lambda w, g: ops.channel_moments(w * g),
    "channel_dots": lambda w, g: ops.channel_dots(w, g, samples=2),
    "gram": lambda w, g: ops.gram(w + g),
    "product": lambda w, g: ops.product(w, g),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_code_holds_the_ops_in_one_graph(name: str) -> None:
    w, g = torch.randn(6, 5), torch.randn(6, 5)
    found = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)(w, g)
    for got, expected in zip(tree_leaves(found), tree_leaves(CALLS[name](w, g)), strict=True):
        assert torch.equal(got, expected)


@compiled
@pytest.mark.parametrize(
    "arguments",
    [
        ([[0, 0, 1]], [1, -1], (1, 6)),  # an output that is not what the runs keep
        ([[0, 0, 6]], [1, -1], (6, 7)),  # a run past the end
        ([[-1, 0, 1]], [1, -1], (1, 7)),
        ([[0, 1, 1]], [1, -1], (1, 7)),  # a hole in the output
        ([[0, 0, 1], [1, 1, 1]], [1, -1], (1, 7)),  # a run that nothing counts
        ([[0, 0, 1]], [1], (1, 7)),
    ],
)
def test_the_compiled_gather_itself_refuses_runs_that_leave_memory(arguments: Any) -> None:
    runs, counts, shape = arguments
    with pytest.raises(RuntimeError):
        torch.ops.pyprune.gather([torch.ones(5, 7)], torch.tensor(runs), counts, [torch.ones(shape)])


def digest(isa: str) -> str:
    """Hash of the bits that a fresh process computes on the given instruction set."""
    code = "import test_op_registration as t; print(t.bits())"
    here = Path(__file__).parent
    done = run_fresh(code, cwd=here, path=(PACKAGE, here, here.parent), PYPRUNE_CPU_ISA=isa)
    assert done.status == 0, done.err
    chosen, value = done.out.split()
    assert chosen == isa
    return value


def bits() -> str:
    found = hashlib.sha256()
    for dtype in (*FLOATS, torch.float64):
        weights, grads, curvatures = inputs([(130, 2100), (33, 47), (3, 5, 21), (19,)], dtype)
        for formula in reference.FORMULAS:
            for t in chain(*ops.salience(formula, weights, grads, curvatures)):
                found.update(t.numpy().tobytes())
        ops.accumulate_square_(curvatures, grads, 0.3)
        for t in curvatures + ops.gather(curvatures, [{0: range(0, h.shape[0], 2)} for h in curvatures]):
            found.update(t.numpy().tobytes())
        for t in (*ops.channel_moments(grads[0]), ops.channel_dots(grads[2], grads[2])):
            found.update(t.numpy().tobytes())
    return f"{ops.backend_info()['cpu_isa']} {found.hexdigest()}"


@compiled
def test_every_instruction_set_gives_the_same_bits() -> None:
    info = ops.backend_info()
    available = info["build"]["cpu_isas"]
    usable = available[: available.index(_widest(available)) + 1]
    assert len({digest(isa) for isa in usable}) == 1


def _widest(available: list[str]) -> str:
    """What a process without PYPRUNE_CPU_ISA chooses."""
    forget = "import os; os.environ.pop('PYPRUNE_CPU_ISA', 0)"
    code = f"{forget}; from pyprune import ops; print(ops.backend_info()['cpu_isa'])"
    chosen = run_fresh(code, cwd=PACKAGE, path=(PACKAGE,)).out.strip()
    assert chosen in available
    return chosen


def test_without_a_compiled_library_the_reference_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, grads, curvatures = inputs([(30, 40), (7,), (2, 5, 6)], torch.bfloat16)
    indices = [{0: [1, 4], 1: range(3, 30)}, {0: [6, 0]}, None]
    before = ops.salience("mixed", weights, grads, curvatures), ops.gather(weights, indices)
    monkeypatch.setattr(_native, "native", lambda: _native.Native(None, None, "not compiled"))
    info = ops.backend_info()
    assert not info["native"]
    assert info["problem"] == "not compiled"
    after = ops.salience("mixed", weights, grads, curvatures), ops.gather(weights, indices)
    for a, b in zip(chain(*before[0]), chain(*after[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    x = torch.randn(3, 40, 50)
    plain = [*ops.channel_moments(x), ops.channel_dots(x, x)]
    reference_h = [h.clone() for h in curvatures]
    ops.accumulate_square_(reference_h, grads, 0.5)
    monkeypatch.undo()
    for a, b in zip(plain, [*ops.channel_moments(x), ops.channel_dots(x, x)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ops.accumulate_square_(curvatures, grads, 0.5)
    for a, b in zip(reference_h, curvatures, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_kernels_run_on_the_current_stream() -> None:
    """Work queued on a side stream is seen by a kernel launched on it, without any synchronisation in between."""
    stream = torch.cuda.Stream()
    w, g = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        w.fill_(2.0)
        rows, _ = ops.salience("taylor_abs", [w], [g])
        (kept,) = ops.gather([w], [{0: [0, 5]}])
    stream.synchronize()
    assert bool((rows[0] == 8192.0).all())
    assert bool((kept == 2.0).all())

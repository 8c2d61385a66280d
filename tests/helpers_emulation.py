"""The CUDA kernels compiled by the C++ compiler against tests/cuda/emulator, and called through ctypes.

What a GPU adds is speed and the hardware's own rounding; indices, bounds, fragment layouts, barriers and the order of
sums are the kernels' own code, and are run here on every machine.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyprune.ops import reference
from pyprune.ops._native import native

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
EMULATOR = TESTS / "cuda" / "emulator"
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
LIBRARY = "libemulated.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMULAS = {"abs": 0, "square": 1, "taylor_signed": 2, "taylor_abs": 3, "fisher": 4, "mixed": 5}


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64)]


class SalienceTensor(ctypes.Structure):
    _fields_ = [
        ("weight", Matrix), ("grad", Matrix), ("curvature", Matrix),
        ("batches", ctypes.c_int64), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
        ("row_sums", ctypes.c_void_p), ("col_sums", ctypes.c_void_p),
        ("dtype", ctypes.c_int32), ("grad_dtype", ctypes.c_int32),
    ]  # fmt: skip


class KeptRuns(ctypes.Structure):
    _fields_ = [("runs", ctypes.c_void_p), ("count", ctypes.c_int64), ("whole", ctypes.c_bool)]


class GatherTensor(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_void_p), ("dest", ctypes.c_void_p), ("element_size", ctypes.c_int64),
        ("batches", ctypes.c_int64), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
        ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64),
        ("out_batches", ctypes.c_int64), ("out_rows", ctypes.c_int64), ("out_cols", ctypes.c_int64),
        ("kept_batches", KeptRuns), ("kept_rows", KeptRuns), ("kept_cols", KeptRuns),
    ]  # fmt: skip


class AccumulateTensor(ctypes.Structure):
    _fields_ = [
        ("curvature", ctypes.c_void_p), ("grad", ctypes.c_void_p), ("size", ctypes.c_int64),
        ("grad_dtype", ctypes.c_int32),
    ]  # fmt: skip


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernels in ``folder``: launches become calls, and the emulator's headers stand for CUDA's."""
    shutil.copytree(CSRC / "planning", folder / "planning")
    shutil.copy(CSRC / "common.h", folder)
    kernels = folder / "kernels"
    kernels.mkdir()
    sources = [EMULATOR / "emulator.cpp"]
    for file in sorted((CSRC / "kernels").iterdir()):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".cu":
            text = LAUNCH.sub(_call, text)
            assert text.count("<<<") == 0, file
            sources.append(kernels / f"{file.stem}.cpp")
            sources[-1].write_text(text, encoding="utf-8")
        elif file.name not in ("tensor_core.cuh", "hopper.cuh"):
            (kernels / file.name).write_text(LAUNCH.sub(_call, text), encoding="utf-8")
    for file in (*EMULATOR.glob("*.h"), *EMULATOR.glob("*.cuh")):
        shutil.copy(file, kernels)
    library = folder / LIBRARY
    # -O1: a fiber may move between calls that the optimiser would otherwise see as one.
    command = [str(compiler()), "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-Wno-psabi"]
    command.append("-DPYPRUNE_COMPILED_FOR_90A")
    subprocess.run([*command, f"-I{folder}", f"-I{kernels}", "-o", str(library), *map(str, sources)], check=True)
    return ctypes.CDLL(str(library))


def build_changed(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, good: str, bad: str) -> ctypes.CDLL:
    """The same with ``bad`` in place of ``good`` in one of the kernels' files."""
    broken, build_in = folder / "repository" / "csrc", folder / "build"
    for part in ("planning", "kernels"):
        shutil.copytree(CSRC / part, broken / part)
    shutil.copy(CSRC / "common.h", broken)
    text = (broken / "kernels" / file).read_text(encoding="utf-8")
    assert good in text, (file, good)
    (broken / "kernels" / file).write_text(text.replace(good, bad), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "CSRC", broken)
    build_in.mkdir()
    return build(build_in)


def _call(launch: re.Match[str]) -> str:
    kernel, configuration, arguments = launch.groups()
    grid, block, shared, _stream = (part.strip() for part in configuration.split(","))
    at_once = 2 if "_pairs<" in kernel else 1
    return f"emulator::launch({grid}, {block}, {shared}, [=] {{ {kernel}({arguments}); }}, {at_once});"


def matrix(t: Tensor) -> Matrix:
    """A tensor [.., rows, cols] with neighbouring columns."""
    assert t.stride(-1) == 1 or t.shape[-1] <= 1
    return Matrix(t.data_ptr(), t.stride(0) if t.dim() == 3 else 0, t.stride(-2))


def activation_salience(
    library: ctypes.CDLL,
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    formula: str,
    transposed: bool,
    scales: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    rows_input, cols_input = (x, dy) if transposed else (dy, x)
    rows, cols = torch.full((weight.shape[0],), torch.nan), torch.full((weight.shape[1],), torch.nan)
    sizes = (ctypes.c_int64 * 4)(x.shape[0], x.shape[1], *weight.shape)
    matrices = [ctypes.byref(matrix(t)) for t in (rows_input, cols_input, weight)]
    status = library.emulate_activation(
        FORMULAS[formula], DTYPES[weight.dtype], *matrices, sizes, ctypes.c_float(scales[0]), ctypes.c_float(scales[1]),
        ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(cols.data_ptr()),
    )  # fmt: skip
    assert status == 0
    return rows, cols


def layer(samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(samples, tokens, inputs), (samples, tokens, outputs), (outputs, inputs)]
    return tuple(torch.randn(s).to(dtype) for s in shapes)  # type: ignore[return-value]


def assert_activation(
    library: ctypes.CDLL, x: Tensor, dy: Tensor, weight: Tensor, formula: str, transposed: bool = False
) -> None:
    wide = [t.double() for t in (x, dy, weight)]
    options = {"transposed": transposed, "gradient_scale": 0.5, "curvature_scale": 0.25}
    expected = reference.activation_salience(*wide, formula, **options)
    parts = {"taylor_signed": ["taylor_abs"], "mixed": ["taylor_abs", "fisher"]}.get(formula, [formula])
    masses = [reference.activation_salience(*(t.abs() for t in wide), part, **options) for part in parts]
    got = activation_salience(library, x, dy, weight, formula, transposed, (0.5, 0.25))
    for side in (0, 1):
        error = (got[side].double() - expected[side]).abs()
        assert bool((error <= 1e-6 * sum(m[side] for m in masses)).all()), (formula, weight.dtype, tuple(x.shape))


@contextmanager
def capability_9(library: ctypes.CDLL, expected: int | None = None) -> Iterator[None]:
    """The kernels take the GPU for one of compute capability 9.0, with ``expected`` launches of pairs of blocks."""
    count = library.emulate_launches_of_pairs
    count.restype = ctypes.c_int64
    before = count()
    library.emulate_capability(9)
    try:
        yield
    finally:
        library.emulate_capability(8)
    assert expected is None or count() - before == expected


@contextmanager
def captured(library: ctypes.CDLL) -> Iterator[Callable[[], None]]:
    """Launches within it are not run, but kept as in a CUDA graph; what it gives runs them, whenever it is called."""

    def replay() -> None:
        assert library.emulate_graph() == 0

    library.emulate_capture(True)
    try:
        yield replay
    finally:
        library.emulate_capture(False)


def channel_sums(library: ctypes.CDLL, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of a*b [B, C] (and nothing), or of a [C] and of a^2 [C], for a, b [B, T, C]."""
    sums = torch.full((a.shape[2],) if b is None else (a.shape[0], a.shape[2]), torch.nan)
    squares = torch.full((a.shape[2],), torch.nan)
    sizes = (ctypes.c_int64 * 3)(*a.shape)
    status = library.emulate_channels(
        DTYPES[a.dtype], ctypes.byref(matrix(a)), None if b is None else ctypes.byref(matrix(b)), sizes,
        ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(squares.data_ptr()),
    )  # fmt: skip
    assert status == 0
    return sums, squares


def salience(
    library: ctypes.CDLL, formula: str, weights: list[Tensor], grads: list[Tensor], curvatures: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of tensors [rows, cols]."""
    return prepared_salience(library, formula, weights, grads, curvatures)()


def prepared_salience(
    library: ctypes.CDLL, formula: str, weights: list[Tensor], grads: list[Tensor], curvatures: list[Tensor]
) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """The same, prepared once: each call launches it on what the tensors hold by then."""
    rows = [torch.full(w.shape[:1], torch.nan) for w in weights]
    cols = [torch.full(w.shape[1:], torch.nan) for w in weights]
    entries = (SalienceTensor * len(weights))()
    for i, (w, g, h) in enumerate(zip(weights, grads, curvatures, strict=True)):
        entries[i] = SalienceTensor(
            matrix(w), matrix(g), matrix(h), 1, *w.shape, rows[i].data_ptr(), cols[i].data_ptr(), DTYPES[w.dtype],
            DTYPES[g.dtype],
        )  # fmt: skip
    count = ctypes.c_int64(len(weights))
    library.emulate_salience_workspace.restype = library.emulate_passes_size.restype = ctypes.c_int64
    workspace = torch.full((library.emulate_salience_workspace(entries, count),), 255).byte()
    passes = torch.zeros(library.emulate_passes_size(), dtype=torch.uint8)
    addresses = (ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(passes.data_ptr()))
    assert library.emulate_prepare_salience(FORMULAS[formula], entries, count, *addresses) == 0
    del entries

    def call() -> tuple[list[Tensor], list[Tensor]]:
        for sums in (*rows, *cols):
            sums.fill_(torch.nan)
        assert len(workspace) and library.emulate_launch_salience(ctypes.c_void_p(passes.data_ptr())) == 0
        return rows, cols

    return call


def gather(library: ctypes.CDLL, calls: list[tuple[Tensor, list[np.ndarray | None], Tensor]]) -> None:
    """``source[batches, rows, cols]`` into memory at each (source [B, R, C], kept positions or None, destination)."""
    entries, held = (GatherTensor * len(calls))(), []
    for i, (source, kept, dest) in enumerate(calls):
        runs = [None if k is None else native().module.coalesce_runs(k) for k in kept]
        held.append(runs)
        sizes = [n if k is None else len(k) for n, k in zip(source.shape, kept, strict=True)]
        entries[i] = GatherTensor(
            source.data_ptr(), dest.data_ptr(), source.element_size(), *source.shape, *source.stride()[:2], *sizes,
            *(KeptRuns(None, 0, True) if r is None else KeptRuns(r.ctypes.data, len(r), False) for r in runs),
        )  # fmt: skip
    assert library.emulate_gather(entries, ctypes.c_int64(len(calls))) == 0


def accumulate_square(library: ctypes.CDLL, curvatures: list[Tensor], grads: list[Tensor], scale: float) -> None:
    """curvature += scale * grad^2, in place."""
    entries = (AccumulateTensor * len(grads))()
    for i, (h, g) in enumerate(zip(curvatures, grads, strict=True)):
        entries[i] = AccumulateTensor(h.data_ptr(), g.data_ptr(), g.numel(), DTYPES[g.dtype])
    assert library.emulate_accumulate(entries, ctypes.c_int64(len(grads)), ctypes.c_double(scale)) == 0

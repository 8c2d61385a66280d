"""A pytest plugin: PyTorch finds a GPU that is not there (pretended_gpu.cpp), so that what the product does on a GPU is
run on every machine (``make test-device``). Where PyTorch has CUDA of its own, nothing is pretended.

It must come before anything imports torch: ``python -m pytest -p tests.device.pretended_gpu``.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
GIB = 2**30


def _library(torch_folder: Path) -> Path:
    """The compiled source, made anew where it or PyTorch has changed."""
    said = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    path = SOURCE.parents[2] / "build" / f"pretended-gpu-{said}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        include, libraries = torch_folder / "include", torch_folder / "lib"
        compiler = shutil.which("c++") or shutil.which("g++") or "c++"
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", SOURCE, f"-I{include}",
                 f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{libraries}", "-ltorch_cpu", "-lc10",
                 "-o", made],
                check=True,
            )  # fmt: skip
            made.rename(path)
    return path


def _load(folder: Path) -> None:
    """PyTorch asks once for its GPUs, while it is imported."""
    library = _library(folder)
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _answer_for_cuda() -> None:
    """What ``torch.cuda`` says where PyTorch has no CUDA."""
    import torch

    state = torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name="pretended", major=9, minor=0, total_memory=8 * GIB, multi_processor_count=4, gcnArchName=""
    )
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "synchronize": None, "empty_cache": None, "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": properties.name, "get_device_properties": properties, "mem_get_info": (8 * GIB, 8 * GIB),
        "memory_allocated": 1, "memory_reserved": 1, "max_memory_allocated": 1, "max_memory_reserved": 1,
        "reset_peak_memory_stats": None, "is_current_stream_capturing": False, "manual_seed": None,
        "manual_seed_all": None, "get_rng_state": state, "get_rng_state_all": [state], "set_rng_state": None,
        "set_rng_state_all": None, "device": nullcontext(), "stream": nullcontext(),
        "current_stream": torch.Stream(device="cuda:0"), "_lazy_init": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def _compute_ops() -> None:
    """The product's own ops, by the CPU's kernels: what they do on a GPU has tests of its own (tests/cuda)."""
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_leaves, tree_map_only

    from pyprune.ops import _native

    if not _native.native().available:
        return
    _native.Native.cuda_compiled = property(lambda self: self.available)  # type: ignore[assignment, method-assign]
    library = torch.library.Library("pyprune", "IMPL")

    def serve(name: str) -> None:
        op = getattr(torch.ops.pyprune, name).default
        written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

        def run(*arguments: Any) -> Any:
            lists = [i for i, a in enumerate(op._schema.arguments) if not (name == "gather" and a.name == "runs")]
            places = {t.device for i in lists for t in tree_leaves(arguments[i]) if isinstance(t, Tensor)}
            if len(places) != 1:
                raise RuntimeError(f"pyprune::{name}: tensors on {places}")
            lent = tree_map_only(Tensor, lambda t: t.cpu(), arguments)
            out = op(*lent)
            for changed, one, other in zip(written, arguments, lent, strict=True):
                if changed:
                    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
                        a.copy_(b)
            return tree_map_only(Tensor, lambda t: t.cuda(), out)

        library.impl(name, run, "CUDA", allow_override=True)

    for name in ("salience", "accumulate_square_", "gather", "activation_salience", "channel_moments", "channel_dots"):
        serve(name)
    _kept.append(library)


def _pretend() -> None:
    assert "torch" not in sys.modules, "torch is imported already"
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    if run_path(str(folder / "version.py"))["cuda"] is not None:
        return
    _load(folder)
    _answer_for_cuda()
    _compute_ops()


_kept: list[Any] = []
_pretend()

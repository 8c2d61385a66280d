"""Finds and loads the compiled parts, once, and keeps the reason when they cannot be used.

Two shared objects sit beside the package: the operator library, which registers ``torch.ops.pyprune.*`` through
LibTorch's stable ABI, and the extension module ``pyprune._C``, which plans launches and knows how it was built.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

LIBRARY_NAME = "libpyprune_ops.so"
Function = TypeVar("Function", bound=Callable[..., Any])
log = logging.getLogger(__name__)


def constant(function: Function) -> Function:
    """Marks what ``torch.compile`` is to call once instead of tracing it: what it returns is the process's own.

    ``torch.compiler.assume_constant_result`` sets the same mark, and imports the compiler to do so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Native(NamedTuple):
    """What is loaded: the extension module and the operator library's path, or why there is none."""

    module: ModuleType | None
    library: Path | None
    problem: str

    @property
    def available(self) -> bool:
        return self.module is not None

    @property
    def cuda_compiled(self) -> bool:
        return self.module is not None and bool(self.module.build_info()["cuda"])


@lru_cache(maxsize=1)
def native() -> Native:
    """The compiled parts, loaded on the first call; never raises."""
    path = Path(__file__).resolve().parent.parent / LIBRARY_NAME
    if not path.exists():
        return Native(None, None, f"not compiled: {path} does not exist")
    try:
        module = importlib.import_module("pyprune._C")
        torch.ops.load_library(str(path))
        from pyprune.ops import _fake  # noqa: F401  registers the meta implementations
    except (ImportError, OSError, RuntimeError) as error:
        return Native(None, path, f"{type(error).__name__}: {error}".splitlines()[0])
    return Native(module, path, "")


@constant
def runs_on(device: torch.device) -> bool:
    """True when the compiled kernels can serve tensors on ``device``."""
    found = native()
    if not found.available:
        return False
    if device.type == "cpu":
        return True
    if device.type != "cuda" or not found.cuda_compiled:
        return False
    return cuda_problem(torch.cuda.current_device() if device.index is None else device.index) == ""


@cache
def cuda_problem(index: int) -> str:
    """Why the compiled kernels do not run on a GPU, or "": tried once, on one element.

    They are compiled for certain GPUs, and against a CUDA runtime that wants a driver at least as new.
    """
    try:
        _try_cuda(index)
    except torch.OutOfMemoryError:
        raise  # which says nothing of the kernels
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        log.warning("the CUDA kernels do not run on GPU %d, PyTorch computes in their place: %s", index, problem)
        return problem
    return ""


def _try_cuda(index: int) -> None:
    torch.ops.pyprune.channel_moments(torch.ones(1, 1, device=torch.device("cuda", index)))


@constant
def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels were chosen for; None without them."""
    module = native().module
    return None if module is None else str(module.cpu_isa())


def backend_info() -> dict[str, Any]:
    """Which kernels serve the ops here.

    Returns:
        ``native`` (bool), ``library`` (path or None), ``problem`` (why there is no compiled library, else ""),
        ``build`` (how it was compiled, a dict), ``cpu_isa`` (instruction set chosen at run time), ``cuda_compiled``
        and ``cuda_usable`` (bool), ``cuda_problem`` (why compiled CUDA kernels are not usable, else "").
    """
    found = native()
    info: dict[str, Any] = {
        "native": found.available,
        "library": None if found.library is None else str(found.library),
        "problem": found.problem,
        "build": {},
        "cpu_isa": None,
        "cuda_compiled": False,
        "cuda_usable": False,
        "cuda_problem": "",
    }
    if found.module is not None:
        info["build"] = dict(found.module.build_info())
        info["cpu_isa"] = found.module.cpu_isa()
        info["cuda_compiled"] = found.cuda_compiled
        if found.cuda_compiled:
            seen = torch.cuda.is_available()
            problem = cuda_problem(torch.cuda.current_device()) if seen else "PyTorch sees no CUDA device"
            info["cuda_problem"], info["cuda_usable"] = problem, problem == ""
    return info

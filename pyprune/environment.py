"""What this installation consists of, for ``pyprune env`` and for bug reports.

Every probe is guarded: a broken part is reported as such instead of ending the report. PyTorch is imported because its
CUDA state cannot be read otherwise; other packages are asked for their version only.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "transformers",
    "safetensors",
    "numpy",
    "peft",
    "accelerate",
    "datasets",
    "lm-eval",
    "click",
    "rich",
    "pyyaml",
)


def collect() -> dict[str, Any]:
    """The facts, as JSON-serialisable values.

    Returns:
        ``pyprune`` (version), ``python``, ``platform``, ``cpu``, ``torch``, ``packages`` (name to version or None),
        ``kernels`` (the compiled parts: path, compiler, instruction set, CUDA compiled and usable) and ``gpus``. A
        section whose probe failed is ``{"error": "..."}``.
    """
    return {
        "pyprune": _version("pyprune"),
        "python": _guarded(_python),
        "platform": _guarded(platform.platform),
        "cpu": _guarded(_cpu),
        "torch": _guarded(_torch),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": _guarded(_kernels),
        "gpus": _guarded(_gpus),
    }


def format_text(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as aligned lines."""
    lines: list[tuple[str, str]] = [("pyprune", facts["pyprune"] or "not installed as a package")]
    for name in ("python", "platform", "cpu", "torch"):
        lines.append((name, _shown(facts[name])))
    for name, found in facts["packages"].items():
        lines.append((name, found or "not installed"))
    kernels = facts["kernels"]
    if "error" in kernels:
        lines.append(("kernels", _shown(kernels)))
    else:
        lines += _kernel_lines(kernels)
    gpus = facts["gpus"]
    if isinstance(gpus, dict):
        lines.append(("gpus", _shown(gpus)))
    elif not gpus:
        lines.append(("gpus", "none"))
    for i, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        lines.append((f"gpu {i}", _shown(gpu)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _kernel_lines(kernels: dict[str, Any]) -> list[tuple[str, str]]:
    if not kernels["native"]:
        return [("kernels", f"PyTorch reference only ({kernels['problem']})")]
    build = kernels["build"]
    lines = [
        ("kernels", f"compiled: {kernels['library']}"),
        (
            "built with",
            f"{build['compiler']}, headers of torch {build['torch_headers']}, stable ABI {build['stable_abi']}",
        ),
        ("cpu kernels", f"{kernels['cpu_isa']} (compiled: {', '.join(build['cpu_isas'])})"),
    ]
    if not kernels["cuda_compiled"]:
        return [*lines, ("cuda kernels", "not compiled")]
    usable = "usable" if kernels["cuda_usable"] else f"not usable here ({kernels['cuda_problem']})"
    return [*lines, ("cuda kernels", f"compiled by nvcc {build['cuda_version']} for {build['cuda_archs']}, {usable}")]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return str(value)


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # the report must appear whatever is broken
        return {"error": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable}


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model(), "cores": os.cpu_count(), "usable": usable}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


def _kernels() -> dict[str, Any]:
    from pyprune.ops import backend_info

    return backend_info()


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]

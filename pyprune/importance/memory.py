"""How much memory scoring may take, and how much it took."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from torch import nn

from pyprune.errors import PyPruneError


def activation_budget(asked: float | None, model: nn.Module, device: torch.device) -> int:
    """Bytes of saved activations that may stay alive.

    Args:
        asked: MiB, or None for as much as the model's weights take, but no more than a quarter of the free memory.

    Raises:
        PyPruneError: a negative size.
    """
    if asked is not None:
        if not 0 <= asked < float("inf"):
            raise PyPruneError("activation_memory", asked, "must be a number of MiB, at least 0")
        return int(asked * 2**20)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    free = _free(device)
    return own if free is None else min(own, free // 4)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on the GPU since the counter was reset; without a GPU, the most that
    the process ever had resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such counter in the standard library
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim_heap(device: torch.device) -> None:
    """Hand the heap's free pages back to the system, for tensors on the CPU and where the C library is glibc.

    Before version 2.38, glibc cannot put an aligned block (and PyTorch's are) into a hole of its own size, so a pass
    that keeps some of its tensors leaves holes of the size of the others, which nothing fills.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None

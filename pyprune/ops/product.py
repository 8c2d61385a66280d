"""Matrix products of float32 on processors where PyTorch's default library leaves half of the machine unused."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``, without a gradient.

    PyTorch multiplies float32 matrices on the CPU with MKL, which runs AVX-512 on Intel's processors only. oneDNN,
    which PyTorch carries too, runs it on all that have it: twice as fast on AMD's Zen 5. Which of the two is used
    depends on the processor and never on a measurement, so that equal inputs give equal bits.

    Args:
        a: [..., K], any strides.
        b: [N, K], any strides; the dtype and device of ``a``.

    Returns:
        [..., N].
    """
    with torch.no_grad():
        if is_faster(a) and b.dtype == torch.float32 and a.dim() > 1 and a.numel() and b.numel():
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return linear(a, b)


def is_faster(a: Tensor) -> bool:
    """Whether :func:`product` takes another way than PyTorch's own."""
    return a.device.type == "cpu" and a.dtype == torch.float32 and _onednn()


@functools.cache
def _onednn() -> bool:
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not built or torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() in ("", "GenuineIntel"):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """Who made the processor, as it names itself; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""

"""Matrix products of float32 on processors where PyTorch's default library leaves half of the machine unused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from pyprune.ops._native import constant


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

    Raises:
        RuntimeError: PyTorch's, where the two do not fit.
    """
    with torch.no_grad():
        if is_faster(a) and _fits(a, b, None):
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return linear(a, b)


def fast_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        ask = getattr(torch.cpu, "get_capabilities", None)
        if ask is None:  # torch 2.10
            return torch.cpu._is_avx512_bf16_supported()
        found = ask()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


class fast_products(TorchFunctionMode):
    """Within it, linear layers that record no gradient multiply as :func:`product` does. Enter it before other modes
    that watch linear layers: the mode that is entered last sees a call first."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *rest = args
            bias = rest[0] if rest else None
            if is_faster(x) and _fits(x, weight, bias):
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Shapes and dtypes that oneDNN takes as they are; for anything else PyTorch has the answer or the error."""
    if x.dim() < 2 or not x.numel() or weight.dim() != 2 or not weight.numel() or weight.dtype != torch.float32:
        return False
    if weight.device != x.device:
        return False
    return x.shape[-1] == weight.shape[1] and (bias is None or bias.dtype == torch.float32)


def is_faster(a: Tensor) -> bool:
    """Whether :func:`product` takes another way than PyTorch's own."""
    return a.device.type == "cpu" and a.dtype == torch.float32 and _onednn()


@constant
def _onednn() -> bool:
    return _looked_up()


@functools.cache
def _looked_up() -> bool:
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

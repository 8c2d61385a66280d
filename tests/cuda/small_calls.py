"""One small call of every CUDA kernel in every dtype, for compute-sanitizer: ragged sizes, views, several tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import ops


def own(t: Tensor) -> Tensor:
    """A copy in an allocation of whole 16-byte words: kernels read all of the word in which a tensor ends."""
    size = t.numel() * t.element_size()
    frame = torch.empty((size + 15) // 16 * 16, dtype=torch.uint8, device=t.device)
    return frame[:size].view(t.dtype).view(t.shape).copy_(t)


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = ((5, 7), (300, 270), (16, 256), (3, 4, 5), (17,))
        weights = [own(torch.randn(s, device="cuda").to(dtype)) for s in shapes]
        weights.append(weights[1][1:, 3:])
        curvatures = [own(w.float().square()) for w in weights]
        for formula in ("abs", "square", "taylor_signed", "taylor_abs", "fisher", "mixed"):
            ops.salience(formula, weights, weights, curvatures)
            ops.prepare_salience(formula, weights, weights, curvatures)()
        ops.accumulate_square_(curvatures, weights, 0.5)
        ops.gather(weights[:3], [{0: [4, 0]}, {0: range(0, 300, 3), 1: range(1, 270, 2)}, {1: range(8, 200)}])
        for sizes in ((270, 150), (272, 152)):  # rows of any length, and of whole 16-byte words: asynchronous copies
            x, dy = (own(torch.randn(3, 45, n, device="cuda").to(dtype)) for n in sizes)
            weight = own(torch.randn(sizes[1], sizes[0], device="cuda").to(dtype))
            for formula in ("taylor_signed", "taylor_abs", "fisher", "mixed"):
                ops.activation_salience(x, dy, weight, formula)
                ops.activation_salience(x[..., 1:100], dy[..., 3:], weight[3:, 1:100], formula)
        if hasattr(ops, "channel_dots"):
            ops.channel_dots(x, x)
            ops.channel_dots(x[..., 1:], x[..., 1:])
            ops.channel_moments(x.flatten(0, 1))
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

"""Measurements behind ``pyprune bench``: kernels and scoring beside stock PyTorch, and beside what the machine can do.

Everything that is compared is measured in one run, in turn, round after round: the kernel, the same formula in eager
PyTorch, the same through ``torch.compile``, and the ceilings (a copy, a large matrix product).
"""

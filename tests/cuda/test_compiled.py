"""What the compiler makes of kernels that leave no room: their speed stands on it, and no GPU is needed to see it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("name", ["activation_wgmma_bfloat16", "activation_wgmma_float16"])
def test_products_of_four_warps_stay_in_registers_and_run_beside_each_other(name: str, tmp_path: Path) -> None:
    """No number goes through memory, and ptxas puts no wait between products (its notes C7510 to C7520 tell)."""
    flags = ["-std=c++17", "--fmad=false", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command = [str(NVCC), *flags, "-c", str(KERNELS / f"{name}.cu"), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("Compiling entry function") == 4
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 4, said
    assert "(C75" not in said, said

"""setup.py decides by what is installed and what is asked, says so, and compiles nothing it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.build

ROOT = Path(__file__).resolve().parents[2]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` into an empty folder."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler is found: the PyTorch reference kernels serve" in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_cuda_asked_for_without_nvcc_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, PYPRUNE_CUDA="ON", CUDACXX="no-such-nvcc")
    assert done.returncode != 0
    assert "PYPRUNE_CUDA=ON, but nvcc is not found" in done.stderr


def test_a_cuda_compiler_that_is_too_old_is_named(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, PYPRUNE_CUDA="ON", CUDACXX=str(nvcc))
    assert done.returncode != 0
    assert f"PYPRUNE_CUDA=ON, but {nvcc} is of CUDA 11.8, and 12.0 is the oldest that serves" in done.stderr


def test_an_unknown_choice_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, PYPRUNE_CUDA="YES")
    assert done.returncode != 0
    assert "PYPRUNE_CUDA='YES' is not known. Use AUTO, ON or OFF." in done.stderr


@pytest.mark.slow
def test_a_build_without_cuda_says_so_and_loads(tmp_path: Path) -> None:
    done = build(tmp_path, PYPRUNE_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert "CPU kernels only (PYPRUNE_CUDA=OFF)" in done.stderr
    names = sorted(path.name for path in (tmp_path / "lib" / "pyprune").glob("*.so"))
    assert len(names) == 2
    code = f"import torch; torch.ops.load_library({str(tmp_path / 'lib' / 'pyprune' / 'libpyprune_ops.so')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)

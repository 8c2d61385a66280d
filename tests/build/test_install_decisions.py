"""setup.py decides by what is installed and what is asked, says so, and compiles nothing it cannot."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

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


def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[tuple[list[str], str]]:
    """The commands that a build with CUDA would run, and $CXX for each; ``bin/`` has the compilers."""
    (tmp_path / "bin").mkdir()
    for name in ("g++-99", "ccache", "nvcc"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYPRUNE_CUDA": "ON", "CUDACXX": str(tmp_path / "bin" / "nvcc")}
    for name in ("CXX", "CUDAHOSTCXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = []

    def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        if env is not None:
            done.append((command, env["CXX"]))
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    step = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"](setuptools.Distribution())
    step.build_lib, step.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    step.run()
    return done


def host_compilers(command: list[str]) -> list[str]:
    return [word for word in command if word.startswith("-DCMAKE_CUDA_HOST_COMPILER=")]


def test_a_compiler_may_have_a_launcher_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configure, cxx), _ = commands(tmp_path, monkeypatch, CXX="ccache g++-99 -m64")
    assert cxx == f"{tmp_path}/bin/ccache {tmp_path}/bin/g++-99 -m64"
    assert host_compilers(configure) == [f"-DCMAKE_CUDA_HOST_COMPILER={tmp_path}/bin/g++-99"]


@pytest.mark.parametrize("named", [{"CXX": "g++-99", "CUDAHOSTCXX": "g++"}, {}], ids=["host compiler", "nothing"])
def test_nvcc_keeps_its_host_compiler(named: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configure, _), _ = commands(tmp_path, monkeypatch, **named)
    assert host_compilers(configure) == []


def test_elsewhere_than_on_linux_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert commands(tmp_path, monkeypatch) == []
    assert "kernels are compiled on Linux only, and this is darwin: the PyTorch reference" in capsys.readouterr().err


@pytest.mark.parametrize("cxx", ["no-such-compiler", "no-such-launcher c++", "-m64"])
def test_without_a_compiler_the_installation_goes_on(cxx: str, tmp_path: Path) -> None:
    done = build(tmp_path, CXX=cxx)
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


def test_a_plain_installation_brings_what_loads_a_model_onto_a_gpu() -> None:
    """Transformers refuse ``device_map`` without accelerate."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    plain = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    assert '"accelerate' in plain

"""Builds the two shared objects with CMake and ninja; everything else about the package is in pyproject.toml.

Environment:
    PYPRUNE_CUDA        AUTO (default: compile the CUDA kernels if nvcc is 12 or newer), ON (or fail) or OFF.
    PYPRUNE_CUDA_ARCHS  CMake's list of architectures, default "80-real;90a-real;90-virtual".
    PYPRUNE_SANITIZE    sanitizers for the C++ code, for example "address,undefined" (default: none); see .ci/sanitize.
    MAX_JOBS            compile jobs at once; default: one a core.
    CXX                 the C++ compiler, which launchers may precede and options follow ("ccache g++ -m64"). nvcc
                        compiles its host code by it, too, unless CUDAHOSTCXX or NVCC_CCBIN names another.

Without a C++ compiler, and elsewhere than on Linux, nothing is compiled, and the package computes with its PyTorch
reference kernels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80-real;90a-real;90-virtual"
OLDEST_CUDA = 12  # of nvcc, whose headers describe tensors to the copy engine


def say(message: str) -> None:
    """Prints a build decision; ``pip install -v`` shows it, and ``pyprune env`` repeats it afterwards."""
    print(f"pyprune: {message}", file=sys.stderr, flush=True)


def find_tool(*names: str) -> str | None:
    """Full path of the first of the programs that exists, beside this Python or on PATH."""
    beside = str(Path(sys.executable).parent)
    for name in names:
        found = shutil.which(name, path=beside) or shutil.which(name)
        if found:
            return found
    return None


def find_compiler() -> tuple[str, list[str]] | None:
    """(the C++ compiler, the command that it is called by): $CXX when it is set, else what is installed."""
    words = shlex.split(os.environ.get("CXX", ""))
    if not words:
        found = find_tool("c++", "g++", "clang++")
        return (found, [found]) if found else None
    programs = [find_tool(word) or "" for word in takewhile(lambda word: not word.startswith("-"), words)]
    if not programs or "" in programs:
        return None
    return programs[-1], [*programs, *words[len(programs) :]]


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, the one of $CUDA_HOME, PATH, or the usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wanted = os.environ.get("CUDACXX")
    return find_tool(wanted) if wanted else find_tool("nvcc", os.path.join(home, "bin", "nvcc"))


def decide_cuda() -> tuple[str | None, str]:
    """(nvcc or None, why)."""
    choice = os.environ.get("PYPRUNE_CUDA", "AUTO").upper()
    if choice not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"pyprune: PYPRUNE_CUDA={choice!r} is not known. Use AUTO, ON or OFF.")
    if choice == "OFF":
        return None, "PYPRUNE_CUDA=OFF"
    nvcc = find_nvcc()
    problem = "nvcc is not found" if nvcc is None else too_old(nvcc)
    if problem and choice == "ON":
        raise SystemExit(f"pyprune: PYPRUNE_CUDA=ON, but {problem}. Set CUDACXX or CUDA_HOME, or use AUTO.")
    return (None, problem) if problem else (nvcc, f"nvcc is {nvcc}")


def too_old(nvcc: str) -> str:
    """Why this CUDA compiler cannot be used, or nothing; one that does not say its version is tried."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or int(release[1]) >= OLDEST_CUDA:
        return ""
    return f"{nvcc} is of CUDA {release[0].removeprefix('release ')}, and {OLDEST_CUDA}.0 is the oldest that serves"


def find_torch() -> tuple[Path, str] | None:
    """(folder of the installed torch, its version), without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    version: dict[str, str] = {}
    exec((folder / "version.py").read_text(encoding="utf-8"), version)
    return folder, str(version["__version__"])


class CMakeBuild(build_ext):
    """One CMake run for all shared objects of the package."""

    def run(self) -> None:
        if not sys.platform.startswith("linux"):
            say(f"kernels are compiled on Linux only, and this is {sys.platform}: the PyTorch reference kernels serve")
            self.extensions = []
            return
        compiler = find_compiler()
        torch = find_torch()
        if compiler is None:
            say("no C++ compiler is found: the PyTorch reference kernels serve. To compile, set CXX and reinstall")
            self.extensions = []
            return
        if torch is None:
            raise SystemExit(
                "pyprune: torch is not installed here, and the kernels are compiled against its headers. "
                "Install torch first and use pip install --no-build-isolation."
            )
        missing = [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]
        if missing:
            raise SystemExit(f"pyprune: {' and '.join(missing)} not found. pip install {' '.join(missing)}")
        self.compile(*compiler, *torch)

    def compile(self, compiler: str, compiler_command: list[str], torch: Path, torch_version: str) -> None:
        import pybind11

        nvcc, why = decide_cuda()
        archs = os.environ.get("PYPRUNE_CUDA_ARCHS", DEFAULT_ARCHS) if nvcc else ""
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        say(f"C++ compiler {shlex.join(compiler_command)}, torch {torch_version}, {jobs} jobs")
        say(f"CUDA kernels for {archs} ({why})" if nvcc else f"CPU kernels only ({why})")

        package = ROOT / "pyprune" if self.inplace else Path(self.build_lib).resolve() / "pyprune"
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            str(find_tool("cmake")),
            *("-S", str(ROOT), "-B", str(work), "-G", "Ninja", "--fresh"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYPRUNE_OUTPUT={package}",
            f"-DPYPRUNE_TORCH_INCLUDE={torch / 'include'}",
            f"-DPYPRUNE_TORCH_LIBRARY={torch / 'lib' / 'libtorch_cpu.so'}",
            f"-DPYPRUNE_TORCH_VERSION={torch_version}",
            f"-DPYPRUNE_WITH_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DPYPRUNE_SANITIZE={os.environ.get('PYPRUNE_SANITIZE', '')}",
        ]
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPYPRUNE_CUDA_ARCHS={archs}"]
            if os.environ.get("CXX") and not (os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN")):
                configure.append(f"-DCMAKE_CUDA_HOST_COMPILER={compiler}")
        # CMake tells launchers, compiler and options apart by itself where $CXX has them.
        environment = {**os.environ, "CXX": shlex.join(compiler_command)}
        for command in (configure, [str(find_tool("cmake")), "--build", str(work), "--parallel", jobs]):
            try:
                subprocess.run(command, check=True, env=environment)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"pyprune: the build failed with status {error.returncode}; the lines above say why. "
                    "PYPRUNE_CUDA=OFF leaves the CUDA half out."
                ) from error

    def get_outputs(self) -> list[str]:
        """The shared objects that exist, so that an uninstall removes them."""
        package = ROOT / "pyprune" if self.inplace else Path(self.build_lib) / "pyprune"
        return [str(path) for path in sorted(package.glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install copies nothing: CMake has written the shared objects into the package."""
        return {}


setup(ext_modules=[Extension("pyprune._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

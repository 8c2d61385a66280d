"""What the shared objects depend on: the operator library on no Python and no version of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pyprune
from pyprune.ops import backend_info

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not backend_info()["native"], reason="the package was installed without a compiler"),
    pytest.mark.skipif(
        shutil.which("readelf") is None or shutil.which("nm") is None, reason="binutils is not installed"
    ),
]

PACKAGE = Path(pyprune.__file__).parent
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(path: Path) -> set[str]:
    found = set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", str(path))))
    return {name for name in found if not name.startswith("ld-linux")}


def library() -> Path:
    return Path(str(backend_info()["library"]))


def extension() -> Path:
    (path,) = PACKAGE.glob("_C.*.so")
    return path


def test_the_operator_library_needs_libtorch_cpu_and_the_system_only() -> None:
    assert needed(library()) - SYSTEM == {"libtorch_cpu.so"}


def test_the_operator_library_uses_the_stable_c_interface_only() -> None:
    """What libc and libstdc++ do not provide is of the C shim: no C++ ABI of torch, and nothing of Python."""
    lines = run("nm", "-D", "--undefined-only", str(library())).splitlines()
    foreign = [name for kind, name in (line.split()[-2:] for line in lines) if kind == "U" and "@" not in name]
    assert foreign
    assert [name for name in foreign if not name.startswith(("aoti_torch_", "torch_"))] == []


def test_the_operator_library_exports_nothing() -> None:
    """A symbol that is visible could replace, or be replaced by, one of another library in the process."""
    assert run("nm", "-D", "--defined-only", str(library())).split() == []


def test_the_extension_module_does_not_link_torch() -> None:
    assert needed(extension()) <= SYSTEM


@pytest.mark.parametrize("which", [library, extension])
def test_no_path_of_the_building_machine_is_kept(which: object) -> None:
    assert "PATH)" not in run("readelf", "-d", str(which()))  # type: ignore[operator]


def test_cuda_code_is_in_the_library_when_it_was_compiled() -> None:
    info = backend_info()
    sections = run("readelf", "-S", "-W", str(library()))
    assert (".nv_fatbin" in sections) == info["cuda_compiled"]
    if info["cuda_compiled"]:
        assert info["build"]["cuda_archs"]
        assert info["cuda_usable"] == torch.cuda.is_available()


def test_the_build_describes_itself() -> None:
    build = backend_info()["build"]
    assert build["compiler"]
    assert build["stable_abi"] == "2.10"
    assert build["cpu_isas"][0] == "baseline"

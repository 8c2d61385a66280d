"""The emulated kernels, compiled once for all processes of a run."""

from __future__ import annotations

import ctypes
import fcntl
import os

import helpers_emulation as emulation
import pytest


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    found = place / emulation.LIBRARY
    with (place / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            folder = tmp_path_factory.mktemp("emulated")
            emulation.build(folder)
            (folder / emulation.LIBRARY).rename(found)
    return ctypes.CDLL(str(found))

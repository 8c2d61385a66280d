"""The emulated kernels, compiled once."""

from __future__ import annotations

import ctypes

import helpers_emulation as emulation
import pytest


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation.build(tmp_path_factory.mktemp("emulated"))

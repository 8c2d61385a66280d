"""The report of ``pyprune env``: complete, serialisable, and there even when a part is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyprune import environment
from pyprune.ops import _native, backend_info


def test_it_names_versions_kernels_and_devices() -> None:
    facts = environment.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"]["version"] == torch.__version__
    assert facts["kernels"] == backend_info()
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    text = environment.format_text(facts)
    assert torch.__version__ in text
    assert all(name in text for name in environment.PACKAGES)


def test_the_text_says_that_cuda_is_compiled_but_not_usable() -> None:
    facts = environment.collect()
    build = {"compiler": "GNU", "torch_headers": "2.10", "stable_abi": "2.10", "cuda": True}
    build |= {"cuda_version": "13.0", "cuda_archs": "80-real", "cpu_isas": ["baseline", "avx2"]}
    facts["kernels"] = {"native": True, "library": "x.so", "problem": "", "cpu_isa": "avx2", "build": build}
    facts["kernels"] |= {"cuda_compiled": True, "cuda_usable": False, "cuda_problem": "no kernel image"}
    assert "compiled by nvcc 13.0 for 80-real, not usable here (no kernel image)" in environment.format_text(facts)
    facts["kernels"] = {"native": False, "problem": "not compiled: x.so does not exist"}
    assert "PyTorch reference only (not compiled: x.so does not exist)" in environment.format_text(facts)


@pytest.fixture
def compiled_for_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    build = {"cuda": True}
    module = SimpleNamespace(build_info=lambda: build, cpu_isa=lambda: "avx2")
    monkeypatch.setattr(_native, "native", lambda: _native.Native(module, Path("x.so"), ""))
    _native.cuda_problem.cache_clear()
    yield
    _native.cuda_problem.cache_clear()


def test_kernels_that_a_gpu_does_not_take_leave_it_to_pytorch(
    compiled_for_cuda: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(index: int) -> None:
        raise RuntimeError("no kernel image is available\nbacktrace")

    monkeypatch.setattr(_native, "_try_cuda", launch)
    assert not _native.runs_on(torch.device("cuda", 3)) and not _native.runs_on(torch.device("cuda", 3))
    assert [r.message.split(":")[1] for r in caplog.records] == [" no kernel image is available"]
    monkeypatch.setattr(_native, "_try_cuda", lambda index: None)
    assert _native.runs_on(torch.device("cuda", 2)) and not _native.runs_on(torch.device("meta"))


def test_a_broken_part_is_reported_instead_of_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("driver gone")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    facts = environment.collect()
    assert facts["gpus"] == {"error": "OSError: driver gone"}
    assert "OSError: driver gone" in environment.format_text(facts)

"""Files that appear whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyprune.files import whole_file


def test_others_may_read_what_a_library_writes_for_its_user_alone(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with whole_file(tmp_path / "x.safetensors") as work:
            save_file({"x": torch.zeros(2)}, work)
            work.chmod(0o600)
    finally:
        os.umask(mask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as work:
        work.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]

"""Folders that appear whole, where links lead to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_run import python

from pyprune.checkpoint.atomic import check_target, complete_folder
from pyprune.errors import PyPruneError


def write(folder: Path, overwrite: bool = False) -> None:
    with complete_folder(folder, overwrite) as work:
        (work / "new.txt").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path, elsewhere) -> None:
    (elsewhere / "model").mkdir()
    (elsewhere / "model" / "config.json").write_text("old")
    (tmp_path / "link").symlink_to(elsewhere / "model")
    with pytest.raises(PyPruneError, match="exists already"):
        write(tmp_path / "link")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and names(elsewhere / "model") == ["new.txt"]
    assert names(tmp_path) == ["elsewhere", "link"] and names(elsewhere) == ["model"]


def test_a_link_to_nothing_makes_the_folder_that_it_names(tmp_path, elsewhere) -> None:
    (tmp_path / "link").symlink_to(elsewhere / "model")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(elsewhere / "model") == ["new.txt"]
    assert names(tmp_path) == ["elsewhere", "link"]


def test_a_failure_behind_a_link_leaves_what_was_there(tmp_path, elsewhere) -> None:
    (elsewhere / "model").mkdir()
    (elsewhere / "model" / "config.json").write_text("old")
    (tmp_path / "link").symlink_to(elsewhere / "model")
    with pytest.raises(RuntimeError), complete_folder(tmp_path / "link", overwrite=True):
        raise RuntimeError
    assert names(tmp_path / "link") == ["config.json"] and names(elsewhere) == ["model"]


def test_a_link_to_itself_is_refused_before_anything_is_written(tmp_path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(PyPruneError, match="leads back to itself"):
        check_target(tmp_path / "link")


def test_a_link_to_a_file_is_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(PyPruneError, match="is a file"):
        check_target(tmp_path / "link", overwrite=True)


def test_a_folder_of_other_things_is_not_overwritten(tmp_path) -> None:
    """Such as the one that models lie in."""
    model = tmp_path / "models" / "llama"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(PyPruneError, match="is not overwritten, for it holds other things than a model"):
        write(tmp_path / "models", overwrite=True)
    assert names(tmp_path) == ["models"] and names(model) == ["config.json"]


def test_an_empty_folder_is_overwritten(elsewhere) -> None:
    write(elsewhere, overwrite=True)
    assert names(elsewhere) == ["new.txt"]


@pytest.mark.parametrize("name", [".", ".."])
def test_the_working_folder_is_not_overwritten(tmp_path, monkeypatch, name) -> None:
    for folder in (tmp_path, tmp_path / "model"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(PyPruneError, match="holds the folder that this runs in"):
        check_target(name, overwrite=True)


def test_a_folder_with_another_model_inside_is_not_overwritten(tmp_path) -> None:
    for folder in (tmp_path / "model", tmp_path / "model" / "runs" / "best"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    with pytest.raises(PyPruneError, match="is not overwritten, for it holds another model in runs/best"):
        write(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model/runs/best/config.json").is_file()


def test_a_model_with_its_adapter_is_overwritten(tmp_path) -> None:
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "adapter" / "adapter_config.json").write_text("{}")
    write(tmp_path / "model", overwrite=True)
    assert names(tmp_path / "model") == ["new.txt"]


def test_a_name_that_just_fits_is_written(tmp_path) -> None:
    write(tmp_path / ("o" * (255 - 18)))
    with pytest.raises(PyPruneError, match="is too long a name"):
        check_target(tmp_path / ("o" * (256 - 18)))
    with pytest.raises(PyPruneError, match="is too long a name"):
        check_target(tmp_path / ("o" * 300) / "model")


KILLED = """
import os, sys
from pathlib import Path
from pyprune.checkpoint import atomic

renames, real = [], os.rename

def rename(*names):
    renames.append(names)
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    real(*names)

os.rename = rename
with atomic.complete_folder(Path(sys.argv[1]), True) as work:
    (work / "config.json").write_text("half")
"""


def killed_at_rename(folder: Path, number: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("old")
    assert python("-c", KILLED, str(folder), str(number)).status == -9


@pytest.mark.parametrize("number", [2, 3], ids=["before the old one is aside", "before the new one is there"])
def test_what_a_killed_process_left_goes_and_what_it_replaced_is_there_again(tmp_path, number) -> None:
    folder = tmp_path / "a[b]"
    killed_at_rename(folder, number)
    assert len(names(tmp_path)) == 2
    with pytest.raises(PyPruneError, match="exists already"):
        check_target(folder)
    with pytest.raises(RuntimeError), complete_folder(folder, overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["a[b]"] and (folder / "config.json").read_text() == "old"


def test_what_was_replaced_goes_where_the_process_was_killed_before_it_was_removed(tmp_path) -> None:
    for name in ("model", ".model.0123abcd.old", ".model.whatever.old", ".other.0123abcd.old"):
        (tmp_path / name).mkdir()
    write(tmp_path / "model", overwrite=True)
    assert names(tmp_path) == [".model.whatever.old", ".other.0123abcd.old", "model"]


def test_what_a_living_process_writes_stays(tmp_path) -> None:
    """Two writers of one folder, one of them between its renames."""
    write(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with complete_folder(tmp_path / "model", overwrite=True) as first:
        (first / "first.txt").write_text("first")
        write(tmp_path / "model", overwrite=True)
        assert first.is_dir()
        (tmp_path / "model" / "config.json").write_text("{}")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["first.txt"]


def test_what_another_process_has_moved_aside_is_not_moved_back(tmp_path, monkeypatch) -> None:
    write(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("old")
    seen, real = [], os.rename

    def rename(*paths) -> None:
        if "model" not in names(tmp_path):
            seen.append(check_target(tmp_path / "model"))
        real(*paths)

    monkeypatch.setattr("pyprune.checkpoint.atomic.os.rename", rename)
    write(tmp_path / "model", overwrite=True)
    assert len(seen) == 1 and names(tmp_path) == ["model"] and names(tmp_path / "model") == ["new.txt"]

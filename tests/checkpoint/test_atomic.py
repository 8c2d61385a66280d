"""Folders that appear whole, where links lead to them."""

from __future__ import annotations

from pathlib import Path

import pytest

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

"""Licence and notices go along with what is made of a model."""

from __future__ import annotations

from pathlib import Path

import helpers_surgery as h
import pytest
import yaml

from pyprune.checkpoint.load import open_model
from pyprune.checkpoint.save import save

CARD = "---\nlicense: other\nlicense_name: odd\nlanguage:\n- en\ntags:\n- theirs\n---\n\n# A model\n\n---\n"


@pytest.fixture
def licensed(tmp_path: Path) -> Path:
    folder = save(h.tiny("llama"), None, tmp_path / "owner" / "base")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("Do as you like.")
    (folder / "NOTICE").write_text("Made by us.")
    (folder / "NOTICES").mkdir()
    return folder


def header(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_files_and_the_cards_header_go_along_from_folder_to_folder(licensed, tmp_path):
    folder = licensed
    for name in ("one", "two"):
        model, _ = open_model(folder)
        folder = save(model, None, tmp_path / name)
        assert (folder / "LICENSE.txt").read_text() == "Do as you like."
        assert (folder / "NOTICE").read_text() == "Made by us." and not (folder / "NOTICES").exists()
        found = header(folder)
        assert (found["license"], found["license_name"], found["language"]) == ("other", "odd", ["en"])
        assert found["tags"] == ["pruned", "pyprune"]


@pytest.mark.parametrize("card", ["# No header\n", "---\n[odd\n---\n", "---\nodd\n---\n", b"\xff\xfe"])
def test_a_card_that_says_nothing_of_terms(licensed, tmp_path, card):
    (licensed / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    folder = save(open_model(licensed)[0], None, tmp_path / "one")
    assert "license" not in header(folder) and (folder / "NOTICE").exists()


def test_a_file_that_cannot_be_read_costs_no_model(licensed, tmp_path, monkeypatch):
    real = Path.read_bytes

    def read_bytes(self):
        if self.name == "NOTICE":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.warns(UserWarning, match=r"NOTICE cannot be read \(Permission denied\) and does not go along"):
        folder = save(open_model(licensed)[0], None, tmp_path / "one")
    assert (folder / "LICENSE.txt").exists() and not (folder / "NOTICE").exists()


def test_a_model_of_the_hub_has_them_in_the_cache(licensed, tmp_path, monkeypatch):
    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert local_files_only and name == "owner/theirs"
        return str(licensed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = h.tiny("llama")
    model.config._name_or_path = "owner/theirs"
    folder = save(model, None, tmp_path / "one")
    assert header(folder)["license"] == "other" and header(folder)["base_model"] == "owner/theirs"


def test_a_model_that_is_nowhere_has_none(tmp_path):
    model = h.tiny("llama")
    model.config._name_or_path = "owner/nowhere"
    assert "license" not in header(save(model, None, tmp_path / "one"))


def test_a_local_folder_is_not_taken_for_a_model_of_the_hub(licensed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in header(save(open_model("owner/base")[0], None, "one"))

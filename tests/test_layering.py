"""The arrows between packages, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers_run import python

PACKAGE = Path(__file__).resolve().parents[1] / "pyprune"

# Each layer may import what stands below it. `families` is read by surgery and checkpoint.
LAYERS = [
    {"cli", "__main__"},
    {"bench", "runs", "chat"},
    {"pipeline", "recover_pipeline", "report_pipeline", "assess"},
    {"streaming", "cutting"},
    {"opening", "trial"},
    {"recover_preflight", "schedule", "preflight", "layer_removal", "method", "texts", "score_files"},
    {"repeat"},
    {"config", "stage_options", "recovery_options", "parsing"},
    {"recovery", "evaluation", "checkpoint", "report"},
    {"search"},
    {"compensation"},
    {"basis"},
    {"surgery"},
    {"families"},
    {"selection"},
    {"importance"},
    {"discovery"},
    {"environment"},
    {"ops"},
    {"_C"},
]
EVERYBODY = {"caching", "errors", "files", "progress", "units"}
FACADE = "__init__"  # names the public functions, imports nothing when imported
READERS_OF_FAMILIES = {"surgery", "checkpoint"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def owner(file: Path) -> str:
    """The package or root module that a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, functions included; relative imports resolved."""
    package = ["pyprune", *file.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names if module == "pyprune")
    return found


def own_imports(file: Path) -> set[str]:
    """The packages and root modules of pyprune that a file imports."""
    parts = (name.split(".") for name in imported(file))
    return {p[1] for p in parts if p[0] == "pyprune" and len(p) > 1}


def rank(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_imports_upward(file: Path) -> None:
    here = owner(file)
    if here == FACADE:
        return
    assert here in EVERYBODY or any(here in layer for layer in LAYERS), f"{here} has no place in the layers"
    for other in own_imports(file) - EVERYBODY - {here, "__version__"}:
        if here in EVERYBODY:
            pytest.fail(f"{here} may be imported by all, so it may import none, and it imports {other}")
        assert rank(other) >= rank(here), f"{here} imports {other}, which stands above it"
        if other == "families":
            assert here in READERS_OF_FAMILIES, f"{here} reads families"


@pytest.mark.parametrize("package", ["ops", "discovery"])
def test_ops_and_discovery_know_no_transformers(package: str) -> None:
    for file in modules():
        if owner(file) == package:
            heads = {name.split(".")[0] for name in imported(file)}
            assert not heads & {"transformers", "peft", "accelerate", "datasets"}, file


def test_stages_of_one_layer_do_not_import_each_other() -> None:
    side_by_side = {"recovery", "evaluation", "checkpoint", "report"}
    for file in modules():
        if owner(file) in side_by_side:
            assert not (own_imports(file) & side_by_side) - {owner(file)}, file


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "report").mkdir()
    file = tmp_path / "report" / "x.py"
    file.write_text(
        "import pyprune.cli.entry\n"
        "from pyprune import pipeline\n"
        "from .. import surgery as s\n"
        "from ..ops.gather import gather\n"
        "def f():\n    from pyprune.families import find\n"
    )
    assert own_imports(file) == {"cli", "pipeline", "surgery", "ops", "families"}


def test_import_of_the_package_brings_in_neither_torch_nor_numpy() -> None:
    ended = python("-c", "import pyprune, sys; print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()))")
    assert ended.out.strip() == "[]", ended.err

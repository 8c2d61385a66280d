"""The recipe of a whole run: a section for each stage, which holds the options of the verb of that name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyprune.config import (
    EvaluationConfig,
    ExportingConfig,
    PruneConfig,
    Recipe,
    RecoverConfig,
    ReportingConfig,
    option_names,
    parse_yaml,
)
from pyprune.errors import PyPruneError
from pyprune.stage_options import ModelConfig, Stage

OPTION = "RECIPE"  # how errors about the file are headed, as the usage line calls it


SECTIONS: dict[str, type[Recipe]] = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "eval": EvaluationConfig,
    "export": ExportingConfig,
    "report": ReportingConfig,
}
"""Section -> the recipe of its verb, in the order of a run."""

OURS: dict[str, tuple[str, ...]] = {
    "prune": ("model_name_or_path", "output_dir", "overwrite"),
    "recover": ("model_name_or_path", "output_dir", "overwrite", "resume"),
    "eval": ("model_name_or_path", "compare", "output", "overwrite"),
    "export": ("model_name_or_path", "overwrite"),
    "report": ("model_name_or_path", "dense", "recovered", "output", "overwrite"),
}
"""Options that a run sets itself: they follow from the recipe's ``model`` and ``output_dir``."""

_OPENING = ("dtype", "device", "trust_remote_code")
SHARED = {
    "prune": _OPENING,
    "recover": _OPENING,
    "eval": _OPENING,
    "export": ("trust_remote_code",),
    "report": _OPENING,
}
"""What a section takes over from a ``model`` section. The dtype of an export is that of the file it writes."""


@dataclass
class RunRecipe:
    """A run, read and checked.

    Attributes:
        file: where it was read.
        model: the dense model: a folder or a name on the hub.
        output_dir: the work folder, absolute.
        sections: stage -> its recipe, in the order of a run; only those that the file has.
    """

    file: Path
    model: str
    output_dir: Path
    sections: dict[str, Recipe] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in, as YAML and JSON hold it."""
        plain = {name: options_of(name, recipe) for name, recipe in self.sections.items()}
        return {"model": self.model, "output_dir": str(self.output_dir), **plain}


def options_of(name: str, recipe: Recipe) -> dict[str, Any]:
    """Option -> plain value of a section, without those that the run sets."""
    return {k: v for k, v in recipe.to_dict().items() if k not in OURS[name]}


def read_recipe(file: str | Path, model: str | None = None, output_dir: str | Path | None = None) -> RunRecipe:
    """Read the recipe of a run; ``model`` and ``output_dir`` win over what stands in it.

    Raises:
        PyPruneError: the file cannot be read, has an unknown section or option (with the nearest name), a value that
            its option refuses, an option that the run sets itself, or neither model, work folder nor stage; or the
            work folder lies in the model's.
    """
    data = _read(file)
    shared, name = _model(data.pop("model", None), file)
    target = output_dir if output_dir is not None else data.pop("output_dir", None)
    data.pop("output_dir", None)
    name = model or name
    if name is None:
        raise _wrong(file, "names no model", "Write 'model: FOLDER', or give --model.")
    if not isinstance(target, (str, Path)) or not str(target):
        raise _wrong(file, "says not where to work", "Write 'output_dir: FOLDER', or give --output_dir.")
    if Path(target).expanduser().resolve().is_relative_to(Path(name).expanduser().resolve()):
        problem = f"works in {target}, within the model, which would then be another one with every run"
        raise _wrong(file, problem, "Name a folder beside the model.")
    sections = {s: _section(s, data[s], shared, file) for s in SECTIONS if s in data}
    if not sections:
        raise _wrong(file, "has no stage", f"Sections: {', '.join(SECTIONS)}.")
    return RunRecipe(
        file=Path(file), model=str(Path(name).expanduser()) if name.startswith("~") else name,
        output_dir=Path(target).expanduser().absolute(), sections=sections,
    )  # fmt: skip


def _read(file: str | Path) -> dict[str, Any]:
    import yaml

    try:
        data = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PyPruneError(OPTION, str(file), f"cannot be read: {reason}", "Give a YAML file.") from None
    except yaml.YAMLError as error:
        hint = "Write each section once, its options indented by two spaces."
        raise _wrong(file, f"is not YAML: {error}", hint) from None
    if not isinstance(data, dict):
        raise _wrong(file, "holds no sections", f"Write model, output_dir and any of {', '.join(SECTIONS)}.")
    known = ("model", "output_dir", *SECTIONS)
    for key in data:
        if key not in known:
            if key in option_names() and not any(isinstance(data.get(s), dict) for s in SECTIONS):
                hint = f"Give it to that verb: pyprune VERB --config {file}."
                raise _wrong(file, f"is a recipe of one verb: {key!r} is no section", hint)
            raise _wrong(file, f"has the unknown section {key!r}", _near(str(key), known))
    return data


def _model(given: Any, file: str | Path) -> tuple[dict[str, Any], str | None]:
    """(options that the stages share, the model's name) of ``model: NAME``, or of a section with ModelConfig's keys."""
    if given is None or isinstance(given, str):
        return {}, given or None
    known = tuple(f.name for f in fields(ModelConfig))
    if not isinstance(given, dict):
        raise _wrong(file, "names no model in section model", f"Write 'model: FOLDER', or a section of {known}.")
    values = _checked("model", given, known, file)
    try:
        stage: Stage = ModelConfig(**values)
    except PyPruneError as error:
        raise _placed(error, "model", file) from None
    return {k: getattr(stage, k) for k in values if k != "model_name_or_path"}, values.get("model_name_or_path")


def _section(name: str, given: Any, shared: Mapping[str, Any], file: str | Path) -> Recipe:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise _wrong(file, f"has no options in section {name}", "Write one 'option: value' a line, indented.")
    recipe = SECTIONS[name]
    values = _checked(name, given, tuple(f.name for _, f in recipe.options()), file)
    for key in OURS[name]:
        if key in values:
            hint = "Leave it out: it follows from the recipe's model and output_dir."
            raise _wrong(file, f"sets {key} in section {name}, which the run sets itself", hint)
    try:
        return recipe.build({**{k: v for k, v in shared.items() if k in SHARED[name]}, **values})
    except PyPruneError as error:
        raise _placed(error, name, file) from None


def _checked(section: str, given: Mapping[Any, Any], known: tuple[str, ...], file: str | Path) -> dict[str, Any]:
    """The values that are given, under known names."""
    for key in given:
        if key not in known:
            raise _wrong(file, f"has the unknown key {key!r} in section {section}", _near(str(key), known))
    return {k: v for k, v in given.items() if v is not None}


def _placed(error: PyPruneError, section: str, file: str | Path) -> PyPruneError:
    hint = f"{error.hint} (It stands in section {section} of {file}.)"
    return PyPruneError(error.option, error.value, error.problem, hint)


def _wrong(file: str | Path, problem: str, hint: str) -> PyPruneError:
    return PyPruneError(OPTION, str(file), problem, hint)


def _near(name: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."

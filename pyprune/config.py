"""Recipes: the stages of each verb, and where their values come from.

A recipe's keys are flat, because an option's name means one thing. Values come from flags, else from the YAML file,
else from the defaults of :mod:`pyprune.stage_options`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pyprune.errors import PyPruneError
from pyprune.recovery_options import (
    PRESETS,
    AdapterConfig,
    DataConfig,
    DistillConfig,
    ResumeConfig,
    TrainConfig,
)
from pyprune.stage_options import (
    METHODS,
    BasisConfig,
    CalibrationConfig,
    CompensateConfig,
    DepthConfig,
    EvalConfig,
    ExportConfig,
    FolderConfig,
    ModelConfig,
    PageConfig,
    ReportConfig,
    ResultConfig,
    SaveConfig,
    ScopeConfig,
    ScoreConfig,
    ScoreFileConfig,
    SearchConfig,
    SelectConfig,
    SourceConfig,
    SpeedConfig,
    Stage,
    StreamConfig,
    TaskConfig,
)

R = TypeVar("R", bound="Recipe")
# Ways to say the same thing: a flag for one overrides a file's other.
SYNONYMS = (("ratio", "target_params"), ("protocol", "eval_length"))
# Who says one of these says how to prune, and gets nothing else of the method ``best`` with it; of the second kind,
# who says anything but what holds anyway.
HOW = ("criterion", "allocation", "compensation")
HOW_ELSE = (
    "route", "aggregation", "scores_file", "allocation_criterion", "widths", "iterative_steps", "compensation_target",
    "remove_layers", "stream",
)  # fmt: skip


class Recipe:
    """The stages of one verb, their options under flat names. Subclasses are dataclasses with a stage in each field."""

    @classmethod
    def stages(cls) -> dict[str, type[Stage]]:
        """Field name -> stage class, in order."""
        return {f.name: f.default_factory for f in fields(cls)}  # type: ignore[arg-type, misc]

    @classmethod
    def options(cls) -> Iterator[tuple[str, Field[Any]]]:
        """(stage's field name, option's field) for every option, in order."""
        for name, stage in cls.stages().items():
            for f in fields(stage):
                yield name, f

    @classmethod
    def build(cls: type[R], flags: Mapping[str, Any] | None = None, config: str | Path | None = None) -> R:
        """A recipe from flags over the YAML file ``config`` over the defaults; a flag of None was not given.

        Keys that only other verbs have are left to them, so that one file serves every verb.

        Raises:
            PyPruneError: a name that no verb has (the nearest one is suggested), or a value that its option refuses.
        """
        known = {f.name for _, f in cls.options()}
        given = {k: v for k, v in (flags or {}).items() if v is not None}
        for name in given:
            if name not in known:
                raise PyPruneError(name, None, "is not an option", _nearest(name, known))
        file = {} if config is None else read_yaml(config)
        from_file = {k: v for k, v in file.items() if k in known and v is not None}
        for names in SYNONYMS:
            if any(name in given for name in names):
                from_file = {k: v for k, v in from_file.items() if k not in names}
        merged = {**from_file, **given}
        sized = bool(merged.get("ratio") or merged.get("target_params"))
        if "method" in known and "method" not in merged and sized:
            merged["method"] = "plain" if cls._says_how(merged) else "best"
        for option, sets in (("preset", PRESETS), ("method", METHODS)):
            if option in known:
                merged = {**sets.get(str(merged.get(option)), {}), **merged}
        merged = {k: v for k, v in merged.items() if k in known}
        try:
            return cls(**{
                name: stage(**{f.name: merged[f.name] for f in fields(stage) if f.name in merged})
                for name, stage in cls.stages().items()
            })  # fmt: skip
        except PyPruneError as error:
            if error.option in from_file and error.option not in given:
                hint = f"{error.hint} (It stands in {config}.)"
                raise PyPruneError(error.option, error.value, error.problem, hint) from None
            raise

    @classmethod
    def _says_how(cls, given: Mapping[str, Any]) -> bool:
        """Whether options say how to prune."""
        usual = {f.name: f.default for _, f in cls.options()}
        return any(given.get(name) for name in HOW) or any(
            given.get(name) and given[name] != usual[name] for name in HOW_ELSE
        )

    def to_dict(self) -> dict[str, Any]:
        """Option name -> plain value, as YAML and JSON hold it; :meth:`build` makes an equal recipe of it."""
        out = {}
        for stage, f in self.options():
            value = getattr(getattr(self, stage), f.name)
            out[f.name] = None if value is None else f.metadata["parse"].plain(value)
        return out


@dataclass
class PruneConfig(Recipe):
    """`prune`: the whole line."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    basis: BasisConfig = field(default_factory=BasisConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    compensate: CompensateConfig = field(default_factory=CompensateConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    page: PageConfig = field(default_factory=PageConfig)
    streaming: StreamConfig = field(default_factory=StreamConfig)


@dataclass
class InspectConfig(Recipe):
    """`inspect`: what can be pruned."""

    model: SourceConfig = field(default_factory=SourceConfig)


@dataclass
class ScoringConfig(Recipe):
    """`score`: scores into a file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    save: ScoreFileConfig = field(default_factory=ScoreFileConfig)


@dataclass
class EvaluationConfig(Recipe):
    """`eval`: how good, how fast and how large a model is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    result: ResultConfig = field(default_factory=ResultConfig)


@dataclass
class ExportingConfig(Recipe):
    """`export`: a form for other programs."""

    model: SourceConfig = field(default_factory=SourceConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass
class RecoverConfig(Recipe):
    """`recover`: training after pruning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    resuming: ResumeConfig = field(default_factory=ResumeConfig)
    save: FolderConfig = field(default_factory=FolderConfig)
    page: PageConfig = field(default_factory=PageConfig)


@dataclass
class ReportingConfig(Recipe):
    """`report`: the page of a checkpoint, written anew."""

    model: ModelConfig = field(default_factory=ModelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


RECIPES: tuple[type[Recipe], ...] = (
    PruneConfig, InspectConfig, ScoringConfig, RecoverConfig, EvaluationConfig, ExportingConfig,
    ReportingConfig,
)  # fmt: skip


STAGES = ("prune", "recover", "eval", "export", "report")
"""Sections in the recipe of a whole run (:mod:`pyprune.runs`), which are called as the verbs are."""


def option_names() -> set[str]:
    """The options of all verbs."""
    return {f.name for recipe in RECIPES for _, f in recipe.options()}


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; a key that stands twice in a mapping is a mistake, and not the last one's word.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            written = list(node.value)  # what << merges in yields to it
            found = super().construct_mapping(node, deep)
            seen = set()
            for key, _ in written:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
            return found

    return yaml.load(text, Loader)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file; values are as YAML gives them, keys are options of some verb.

    Raises:
        PyPruneError: the file cannot be read, is not a mapping, or has an unknown key.
    """
    import yaml

    try:
        data = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PyPruneError("config", str(file), f"cannot be read: {reason}", "Give a YAML file.") from None
    except yaml.YAMLError as error:
        raise PyPruneError("config", str(file), f"is not YAML: {error}", "Write one 'option: value' a line.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PyPruneError("config", str(file), "holds no options", "Write one 'option: value' a line.")
    if any(isinstance(data.get(name), dict) for name in STAGES):
        problem = "has sections for stages, as a recipe of `pyprune run` has"
        raise PyPruneError("config", str(file), problem, f"Give it to that: pyprune run {file}.")
    known = option_names()
    for key in data:
        if key not in known:
            raise PyPruneError("config", str(file), f"has the unknown key {key!r}", _nearest(str(key), known))
    return data


def _nearest(name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."

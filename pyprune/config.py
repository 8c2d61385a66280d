"""Options of every stage, declared once.

A stage's dataclass is the single source of its options: Python keyword, YAML key and command-line flag share the
field's name, its help and its checks. A *recipe* composes the stages of one verb; its keys are flat, because a field
name means one thing. Values come from flags, else from the YAML file, else from the defaults here.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field())

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pyprune import parsing
from pyprune.errors import PyPruneError

R = TypeVar("R", bound="Recipe")

PROFILE_HELP = "Form that other programs open; prune keeps to widths that it holds. See pyprune export --help."
TARGETS = ("ratio", "target_params")  # two ways to say the same thing: a flag for one overrides a file's other


def option(default: Any, parse: parsing.Parser, help: str) -> Any:
    """A stage's field: its default, the parser that checks what is given, and its help."""
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass
class Stage:
    """Base of the stages: every field that is given goes through its parser, which raises PyPruneError."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                setattr(self, f.name, f.metadata["parse"](f.name, value))


@dataclass
class SourceConfig(Stage):
    """Which model."""

    model_name_or_path: str | None = option(
        None, parsing.path(), "Folder of a Hugging Face model, or its name on the hub; also the first argument."
    )
    trust_remote_code: bool = option(False, parsing.flag(), "Run modelling code that comes with the checkpoint.")


@dataclass
class ModelConfig(SourceConfig):
    """Which model, and how it is opened."""

    dtype: str = option("auto", parsing.choice(*parsing.DTYPES), "Type of the weights; auto keeps the checkpoint's.")
    device: str = option("auto", parsing.device(), "auto, cpu, mps, cuda or cuda:N; auto takes a GPU if there is one.")


@dataclass
class CalibrationConfig(Stage):
    """The text that importance is measured on."""

    calibration: Any = option(
        None,
        parsing.source(),
        "A .txt or .jsonl file (.gz too), token ids in .npy or .safetensors, or a dataset as owner/name:config:split.",
    )
    text_field: str = option("text", parsing.text(), "Field of the calibration records that holds the text.")
    samples: int | None = option(None, parsing.integer(1), "Calibration sequences; 32 of a text, all of token ids.")
    length: int | None = option(None, parsing.integer(2), "Tokens in each; 128 of a text, all of token ids.")
    batch_size: int = option(1, parsing.integer(1), "Calibration sequences in one forward and backward pass.")
    seed: int = option(0, parsing.integer(0), "Seed of the calibration crops and of the criterion random.")


@dataclass
class ScoreConfig(Stage):
    """What a unit is worth."""

    criterion: str = option(
        "param_first",
        parsing.text(),
        "param_first (or taylor), param_second (or fisher), param_mix, vectorize, group_fisher, l1, l2, random.",
    )
    route: str | None = option(
        None,
        parsing.text(),
        "activations or gradients: where Taylor and Fisher scores come from. Left out: activations, where they serve.",
    )
    aggregation: str = option(
        "sum", parsing.text(), "How the parameters of a unit combine: sum, mean, max, prod, first, last."
    )
    activation_memory: float | None = option(
        None, parsing.number(0.0), "MiB of activations kept in place of being recomputed; more is faster."
    )


@dataclass
class ScopeConfig(Stage):
    """Where units may go."""

    roles: tuple[str, ...] | None = option(
        None, parsing.roles(), "Roles, as ffn,kv_heads. Left out: of kv_heads, ffn, expert_ffn those that there are."
    )
    layers: Any = option(None, parsing.layers(), "Decoder layers: 4-27 (27 too), 4:28, 0,2,5-9. Left out: all.")


@dataclass
class SelectConfig(ScopeConfig):
    """How much goes, and from where."""

    ratio: float | None = option(None, parsing.ratio(), "Fraction of the parameters that is gone afterwards.")
    target_params: int | None = option(None, parsing.count(), "Parameters left afterwards, as in 5.4B or 110M.")
    widths: dict[str, int | float] | None = option(
        None, parsing.amounts("widths", alone=False), "Units left in each layer: kv_heads=0.5,ffn=5504."
    )
    allocation: str = option("uniform", parsing.text(), "uniform (the same in every layer) or global (one ranking).")
    round_to: Any = option(None, parsing.multiples("round_to"), "Keep channels in multiples of N, or by role.")
    min_keep: Any = option(
        None, parsing.amounts("min_keep", alone=True), "The least that stays in every layer, as units or fraction."
    )
    iterative_steps: int = option(1, parsing.integer(1), "Prune in this many steps and score again between them.")
    count_embeddings: bool = option(True, parsing.flag(), "Whether the ratio counts embeddings and output head.")
    scores_file: str | None = option(None, parsing.path(), "Use the scores in this file, made by `pyprune score`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.target_params is not None:
            raise PyPruneError("target_params", self.target_params, f"contradicts ratio {self.ratio}", "Give one.")


@dataclass
class EvalConfig(Stage):
    """The text that perplexity is measured on, and the protocol."""

    eval_text: Any = option(None, parsing.source(), "A file or a dataset name, as for calibration.")
    eval_text_field: str = option("text", parsing.text(), "Field of the evaluation records that holds the text.")
    eval_length: int = option(1024, parsing.integer(2), "Tokens in each window.")
    eval_windows: int | None = option(None, parsing.integer(1), "Score the first N windows only.")
    eval_batch_size: int = option(1, parsing.integer(1), "Windows in one forward pass.")
    prompt: str | None = option(None, parsing.text(), "Text that the model continues greedily, shown in the report.")
    prompt_tokens: int = option(32, parsing.integer(1), "Tokens generated after the prompt.")


@dataclass
class SaveConfig(Stage):
    """Where the pruned model goes."""

    output_dir: str | None = option(None, parsing.path(), "Folder to write. Without it nothing is saved.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")
    max_shard_size: str = option("5GB", parsing.size(), "Largest safetensors file.")
    profile: str | None = option(None, parsing.choice(*parsing.PROFILES), PROFILE_HELP)


@dataclass
class StreamConfig(Stage):
    """For models that are larger than memory."""

    stream: bool = option(
        False, parsing.flag(), "Work from disk to disk, one decoder layer in memory; a killed run is resumed."
    )


@dataclass
class ExportConfig(Stage):
    """For which programs, and where it goes."""

    profile: str = option("uniform", parsing.choice(*parsing.PROFILES), PROFILE_HELP)
    output: str | None = option(None, parsing.path(), "Folder to write; with gguf a file that ends in .gguf.")
    dtype: str = option("auto", parsing.choice(*parsing.DTYPES), "Type of the weights; auto keeps the checkpoint's.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")


@dataclass
class ScoreFileConfig(Stage):
    """Where the scores go."""

    output_file: str | None = option(None, parsing.path(), "Safetensors file to write. Without it nothing is saved.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")


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
        if any(name in given for name in TARGETS):
            from_file = {k: v for k, v in from_file.items() if k not in TARGETS}
        merged = {**from_file, **given}
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
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
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
    """`eval`: perplexity of one model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


@dataclass
class ExportingConfig(Recipe):
    """`export`: a form for other programs."""

    model: SourceConfig = field(default_factory=SourceConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


RECIPES: tuple[type[Recipe], ...] = (PruneConfig, InspectConfig, ScoringConfig, EvaluationConfig, ExportingConfig)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file; values are as YAML gives them, keys are options of some verb.

    Raises:
        PyPruneError: the file cannot be read, is not a mapping, or has an unknown key.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PyPruneError("config", str(file), f"cannot be read: {reason}", "Give a YAML file.") from None
    except yaml.YAMLError as error:
        raise PyPruneError("config", str(file), f"is not YAML: {error}", "Write one 'option: value' a line.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PyPruneError("config", str(file), "holds no options", "Write one 'option: value' a line.")
    known = {f.name for recipe in RECIPES for _, f in recipe.options()}
    for key in data:
        if key not in known:
            raise PyPruneError("config", str(file), f"has the unknown key {key!r}", _nearest(str(key), known))
    return data


def _nearest(name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."

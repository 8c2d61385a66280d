"""Options of every stage, declared once.

A stage's dataclass is the single source of its options: Python keyword, YAML key and command-line flag share the
field's name, its help and its checks.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field())

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pyprune import parsing
from pyprune.errors import PyPruneError
from pyprune.evaluation.protocols import DEFAULT_LENGTH, PROTOCOLS

SEED_HELP = (
    "Seed of whatever is drawn: crops, the criterion random, labels of token_fisher, moves of a search, order of "
    "training data, adapters."
)
OUTPUT_HELP = (
    "What to write: a JSON file for eval, a folder for export (a .gguf file with profile gguf), an HTML file for "
    "report (left out: report.html in the folder)."
)
PROFILE_HELP = "Form that other programs open (pyprune export --help); prune keeps to widths that it holds."
GENERATIONS_HELP = (
    "The most prompts that the models continue for the report. Left out: 3 where prune or recover has eval_text or "
    "prompt, else those that prompts gives."
)
PROMPTS_HELP = "Other prompts for that: a text file, one a line; in YAML and Python also a list."
MAX_NEW_TOKENS_HELP = "Tokens generated after a prompt."
AUTO = "auto"  # what a method settles when it knows the model and the size
METHODS: dict[str, dict[str, Any]] = {
    "best": {
        "criterion": "wanda", "allocation": AUTO, "allocation_criterion": AUTO, "allocation_tokens": 8192,
        "compensation": "obs", "compensation_criterion": AUTO, "compensation_scope": "ffn",
        "compensation_gains": True,
    },
    "plain": {},
}  # fmt: skip
"""Method of pruning -> options; :mod:`pyprune.method` settles what depends on the model and the size."""


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
    device: str = option("auto", parsing.device(), "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")


@dataclass
class CalibrationConfig(Stage):
    """The text that importance is measured on."""

    calibration: Any = option(
        None,
        parsing.source(),
        "A .txt or .jsonl file (.gz too), token ids in .npy or .safetensors, or a dataset as owner/name:config:split.",
    )
    text_field: str = option("text", parsing.text(), "Field of the calibration records that holds the text.")
    samples: int | None = option(
        None, parsing.integer(1), "Calibration sequences. Left out: 128 of a text, or what it gives; all of token ids."
    )
    length: int | None = option(
        None, parsing.integer(2), "Tokens in each. Left out: 512 of a text, fewer of a short one; all of token ids."
    )
    bos: bool = option(
        False, parsing.flag(), "Begin every sample of a text as the tokenizer begins texts, with a BOS token."
    )
    batch_size: int = option(
        1, parsing.integer(1), "Sequences that stay together in a pass; short ones are joined to some 1,024 tokens."
    )
    seed: int = option(0, parsing.integer(0, parsing.MAX_SEED), SEED_HELP)


@dataclass
class ScoreConfig(Stage):
    """What a unit is worth."""

    criterion: str = option(
        "param_first",
        parsing.text(),
        "param_first (or taylor), param_second (or fisher), param_mix, vectorize, group_fisher, token_fisher, wanda, "
        "flap, obs, l1, l2, random; reap for the role experts.",
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
        None,
        parsing.number(0.0),
        "MiB of activations kept in place of being recomputed; more is faster. Left out: as much as the weights take, "
        "at most a quarter of the free memory.",
    )
    token_weights: str = option(
        "inverse",
        parsing.choice("inverse", "sink", "equal"),
        "How much a token counts in wanda, flap, obs and refits. inverse: the less, the more power its residual stream "
        "has. sink: the same, but the first token of a sample counts as an eighth of the sample, since all others "
        "attend to it. equal: all alike.",
    )
    score_tokens: int | None = option(
        None,
        parsing.tokens(),
        "Score on the first N tokens of the calibration only, 128 a sample; compensation reads all.",
    )
    cache: str | None = option(
        None,
        parsing.path(),
        "Folder where scores, and the sums behind refits, stay: nothing is measured twice on the same text.",
    )


@dataclass
class CompensateConfig(Stage):
    """How what stays takes over for what goes."""

    compensation: str = option(
        "none",
        parsing.choice("none", "bias", "least-squares", "obs"),
        "least-squares refits the output projections on the calibration text; obs also chooses anew which units go, "
        "by what the refit cannot make up for; bias moves lost means into their biases.",
    )
    compensation_criterion: str = option(
        "none",
        parsing.text(),
        "With obs: criterion that has a say in which units go beside what the refit cannot make up for, as "
        "token_fisher; or none. Not in which heads. It reads as much as allocation_criterion.",
    )
    compensation_target: str = option(
        "own",
        parsing.choice("own", "stream"),
        "What a refit aims at: the layer's own output, or the dense model's stream where held-out error agrees.",
    )
    compensation_scope: str = option(
        "outputs",
        parsing.choice("outputs", "ffn"),
        "What is refitted: the output projections, or also what feeds those of FFNs (gate and up projections), "
        "fitted together to what the FFN gave whole.",
    )
    compensation_gains: bool = option(
        False,
        parsing.flag(),
        "After the cut, multiply what each matrix reads by one number for each channel: those with which the model's "
        "next-token distribution comes nearest to the dense one's.",
    )
    cache_limit: float | None = option(
        None,
        parsing.number(0.0),
        "GiB that the sums of refits may take in the cache folder: 16 where left out, 0 keeps none of them.",
    )


@dataclass
class ScopeConfig(Stage):
    """Where units may go."""

    roles: tuple[str, ...] | None = option(
        None,
        parsing.roles(),
        "Roles, as ffn,kv_heads. Left out: of kv_heads, ffn, expert_ffn those that there are (prune's method best "
        "up to 35 %: FFN channels, and heads too where the ratio is of macs or memory).",
    )
    layers: Any = option(None, parsing.layers(), "Decoder layers: 4-27 (27 too), 4:28, 0,2,5-9. Left out: all.")


@dataclass
class DepthConfig(Stage):
    """Whole layers, or their attention or FFN, that go before widths are cut."""

    remove_layers: int | float | None = option(
        None,
        parsing.removal(),
        "Whole layers to remove: 3 for three of them, 0.2 for a fifth. With a ratio, widths make up the rest of it.",
    )
    layer_criterion: str = option(
        "block_influence",
        parsing.choice("block_influence", "perplexity"),
        "Which go: those that change the stream least, or, one by one, the one whose removal costs least loss.",
    )
    layer_part: str = option(
        "layer",
        parsing.choice("layer", "attention", "ffn"),
        "What of those layers goes: all of it, or its attention or its FFN alone.",
    )


@dataclass
class BasisConfig(Stage):
    """In which coordinates units are looked at before they are scored."""

    value_basis: str = option(
        "own",
        parsing.choice("own", "principal"),
        "For role vo_dim. own: cut the values' dimensions as they are. principal: first turn each head's values, so "
        "that few dimensions carry most of them; what the model computes stays the same.",
    )


@dataclass
class SelectConfig(ScopeConfig):
    """How much goes, and from where."""

    ratio: float | None = option(
        None, parsing.ratio(), "Fraction of the parameters (or of the budget) that is gone afterwards."
    )
    budget: str = option(
        "parameters",
        parsing.choice("parameters", "macs", "memory"),
        "What ratio is of: parameters, macs (multiply-adds of a token), memory (bytes of weights and KV cache).",
    )
    budget_length: int | None = option(
        None, parsing.integer(1), "Tokens in the KV cache of budget memory: 4096 where left out."
    )
    method: str | None = option(
        None,
        parsing.choice(*METHODS),
        "best: the combination that measured best at this size, for whatever of it no other option says. plain: the "
        "defaults of criterion, allocation, compensation. Left out: best, or plain where criterion, allocation or "
        "compensation is given, or route, aggregation, scores_file, allocation_criterion, widths, iterative_steps, "
        "compensation_target, remove_layers or stream with another value than usual.",
    )
    target_params: int | None = option(None, parsing.count(), "Parameters left afterwards, as in 5.4B or 110M.")
    widths: dict[str, int | float] | None = option(
        None, parsing.amounts("widths", alone=False), "Units left in each layer: kv_heads=0.5,ffn=5504."
    )
    allocation: str = option(
        "uniform",
        parsing.text(),
        "uniform (the same in every layer), global (one ranking), knapsack (least total score), log_depth and "
        "linear_depth (more in later layers), divergence (each layer measured alone at several widths on the model, "
        "then a knapsack), descent (whichever of uniform, depth schedules, global and knapsack measures best, then "
        "wider and narrower along slopes measured on the model), search (tried out on the model, as the options of "
        "Search say); auto, with method best only: by the size and the model.",
    )
    allocation_criterion: str | None = option(
        None, parsing.text(), "Criterion that says how much each layer loses, as group_fisher. Left out: criterion."
    )
    allocation_tokens: int | None = option(
        None,
        parsing.tokens(),
        "Score with allocation_criterion on the first N tokens of the calibration only. Left out: as score_tokens.",
    )
    round_to: Any = option(
        None,
        parsing.multiples("round_to"),
        "Keep the roles ffn, expert_ffn, latent, state, hidden and channels in multiples of N, or any role, as "
        "kv_heads=2,ffn=64. Channels of stacked experts are kept in multiples of 8 in any case.",
    )
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
class SearchConfig(Stage):
    """Allocation search: how long, and where it is kept."""

    search_steps: int | None = option(
        None, parsing.integer(1), "Generations of 8 candidates. Left out: as many as fit into search_minutes, or 40."
    )
    search_minutes: float | None = option(None, parsing.positive(), "Stop after this time, of all runs together.")
    search_file: str | None = option(
        None,
        parsing.path(),
        "Where the search keeps its state (JSON), so that a killed one goes on. Left out: beside output_dir, and "
        "removed in the end.",
    )


@dataclass
class EvalConfig(Stage):
    """The text that perplexity is measured on, and the protocol."""

    eval_text: Any = option(None, parsing.source(), "A file or a dataset name, as for calibration.")
    eval_text_field: str = option("text", parsing.text(), "Field of the evaluation records that holds the text.")
    protocol: str | None = option(
        None,
        parsing.choice(*PROTOCOLS),
        "Windows as publications cut them: of 128 tokens as in LLM-Pruner's code, or of 1024, 2048, 4096.",
    )
    eval_length: int = option(
        None, parsing.integer(2), f"Tokens in each window; the protocol's, or {DEFAULT_LENGTH} without one."
    )
    eval_windows: int | None = option(None, parsing.integer(1), "Score the first N windows only.")
    eval_bos: bool = option(
        False,
        parsing.flag(),
        "Begin every window as the tokenizer begins texts (a BOS token), as Gemma needs; publications mostly do not.",
    )
    eval_batch_size: int = option(1, parsing.integer(1), "Windows in one forward pass.")
    prompt: str | None = option(None, parsing.text(), "Text that the model continues greedily, shown in the report.")
    max_new_tokens: int = option(32, parsing.integer(1), MAX_NEW_TOKENS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        length = DEFAULT_LENGTH if self.protocol is None else PROTOCOLS[self.protocol].length
        if self.eval_length is None:
            self.eval_length = length
        elif self.protocol is not None and self.eval_length != length:
            problem = f"contradicts protocol {self.protocol}, which has windows of {length} tokens"
            raise PyPruneError("eval_length", self.eval_length, problem, "Give one of them.")
        if self.eval_bos and self.protocol is not None and PROTOCOLS[self.protocol].special_tokens:
            problem = f"contradicts protocol {self.protocol}, which begins the whole text so, and no window"
            raise PyPruneError("eval_bos", True, problem, "Give one of them.")


@dataclass
class TaskConfig(Stage):
    """Multiple-choice questions."""

    tasks: tuple[str, ...] | None = option(
        None,
        parsing.names(),
        "Task files (.jsonl, .jsonl.gz: context, choices, label), or lm-eval's boolq, piqa, hellaswag, winogrande, "
        "arc_easy, arc_challenge, openbookqa.",
    )
    limit: int | None = option(None, parsing.integer(1), "The first N questions of each task only.")
    task_batch_size: int = option(8, parsing.integer(1), "Continuations in one forward pass.")
    resume_file: str | None = option(
        None, parsing.path(), "Keep log-likelihoods in this file as they come, and reuse those that are in it."
    )


@dataclass
class SpeedConfig(Stage):
    """Tokens a second, memory, multiply-accumulates."""

    speed: bool = option(False, parsing.flag(), "Measure them.")
    speed_prompt: int = option(128, parsing.integer(1), "Tokens of the prompt.")
    speed_tokens: int = option(32, parsing.integer(1), "Tokens generated after the first.")
    speed_batch_size: int = option(1, parsing.integer(1), "Prompts at once.")
    speed_rounds: int = option(5, parsing.integer(1), "Measured runs of each model; the median counts.")


@dataclass
class ResultConfig(Stage):
    """Beside which model, and where the figures go."""

    compare: str | None = option(None, parsing.path(), "Measure this model too, and show ratios MODEL / this one.")
    output: str | None = option(None, parsing.path(), OUTPUT_HELP)
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")


@dataclass
class FolderConfig(Stage):
    """Where the result goes."""

    output_dir: str | None = option(None, parsing.path(), "Folder to write. Without it nothing is saved.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")
    max_shard_size: str = option("5GB", parsing.size(), "Largest safetensors file.")


@dataclass
class SaveConfig(FolderConfig):
    """Where the result goes, and in which form."""

    profile: str | None = option(None, parsing.choice(*parsing.PROFILES), PROFILE_HELP)

    @property
    def is_folder(self) -> bool:
        """Whether a folder with a configuration is written: a GGUF file has none."""
        return self.output_dir is not None and self.profile != "gguf"


@dataclass
class PageConfig(Stage):
    """A page that shows the run, in the output folder."""

    report: bool = option(True, parsing.flag(), "Write report.html, which opens in a browser without a network.")
    generations: int | None = option(None, parsing.integer(0), GENERATIONS_HELP)
    prompts: Any = option(None, parsing.prompts(), PROMPTS_HELP)


@dataclass
class ReportConfig(Stage):
    """What joins the page, and where it goes."""

    dense: str | None = option(None, parsing.path(), "The model before pruning, where it is not where it was.")
    recovered: str | None = option(None, parsing.path(), "Folder that `pyprune recover` made of MODEL.")
    eval: tuple[str, ...] | None = option(
        None, parsing.names(), "Results of `pyprune eval --output`; pyprune_eval*.json in the folders are found."
    )
    generations: int | None = option(None, parsing.integer(0), GENERATIONS_HELP)
    prompts: Any = option(None, parsing.prompts(), PROMPTS_HELP)
    max_new_tokens: int = option(32, parsing.integer(1), MAX_NEW_TOKENS_HELP)
    output: str | None = option(None, parsing.path(), OUTPUT_HELP)
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")


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
    output: str | None = option(None, parsing.path(), OUTPUT_HELP)
    dtype: str = option("auto", parsing.choice(*parsing.DTYPES), "Type of the weights; auto keeps the checkpoint's.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")


@dataclass
class ScoreFileConfig(Stage):
    """Where the scores go."""

    output_file: str | None = option(None, parsing.path(), "Safetensors file to write. Without it nothing is saved.")
    overwrite: bool = option(False, parsing.flag(), "Replace what is there.")

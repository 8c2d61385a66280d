"""Options of the stages that only recovery has, declared as in :mod:`pyprune.stage_options`."""

# ruff: noqa: RUF009 (option() is dataclasses.field())

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyprune import parsing
from pyprune.stage_options import SEED_HELP, Stage, option

PRESETS: dict[str, dict[str, Any]] = {
    # Ma et al., LLM-Pruner (arXiv 2305.11627), section 4 and its post_training.py: Alpaca-cleaned, answers only.
    "llm-pruner": {
        "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
        "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "learning_rate": 1e-4, "lr_scheduler": "linear", "warmup_steps": 100, "train_batch_size": 64, "epochs": 2,
        "cutoff": 256, "packing": False, "instruction_format": "alpaca",
    },
}  # fmt: skip
"""Recipe name -> options."""


@dataclass
class DataConfig(Stage):
    """What the model learns from."""

    data: Any = option(
        None,
        parsing.sources(),
        "Files (.jsonl, .json, .txt, .gz too) or datasets, with commas; NAME=3,OTHER=1 takes tokens 3 to 1.",
    )
    val_data: Any = option(None, parsing.sources(), "The same, for validation. Left out: a part of data is held out.")
    val_tokens: int = option(16384, parsing.tokens(), "Tokens that validation is measured on, at most a tenth of data.")
    max_tokens: int | None = option(None, parsing.tokens(), "The most tokens read from each source, as in 2M.")
    data_field: str = option("text", parsing.text(), "Field of plain records that holds the text.")
    instruction_format: str = option(
        "alpaca", parsing.choice("alpaca", "chat"), "How instruction records read: Alpaca's words, or chat template."
    )
    cutoff: int | None = option(
        None, parsing.integer(8), "Tokens in a sequence, else 512; longer text is split, longer answers are cut."
    )
    packing: bool = option(True, parsing.flag(), "Several documents in a sequence, apart from each other.")
    train_on_prompts: bool = option(False, parsing.flag(), "Learn the prompts of instructions too.")


@dataclass
class AdapterConfig(Stage):
    """Low-rank adapters (LoRA)."""

    lora_r: int = option(32, parsing.integer(1), "Rank.")
    lora_alpha: float | None = option(None, parsing.positive(), "Scale: the update is alpha / r * B A. 2 r if absent.")
    lora_dropout: float = option(0.0, parsing.fraction(whole=False), "Dropout before A.")
    lora_targets: str = option(
        "all-linear", parsing.text(), "all-linear (of the decoder layers), or names: q_proj,v_proj."
    )
    adapter: str | None = option(None, parsing.path(), "Merge this adapter folder; nothing is trained.")
    keep_adapter: bool = option(False, parsing.flag(), "Save the adapter too, in the folder adapter/ of the result.")


@dataclass
class TrainConfig(Stage):
    """How it is trained."""

    epochs: float = option(1.0, parsing.positive(), "Passes over the data.")
    max_minutes: float | None = option(None, parsing.positive(), "Stop after this time; the rate falls to fit it.")
    learning_rate: float | None = option(
        None, parsing.positive(), "Highest learning rate (AdamW). Left out: 1 / hidden size, at most 0.002."
    )
    lr_scheduler: str = option("cosine", parsing.choice("cosine", "linear", "constant"), "How the rate falls to zero.")
    warmup_steps: int = option(20, parsing.integer(0), "Steps in which the rate rises, at most a tenth of all.")
    train_batch_size: int = option(8, parsing.integer(1), "Sequences in a step, over all processes.")
    micro_batch_size: int = option(4, parsing.integer(1), "Sequences in one forward and backward pass of a process.")
    max_grad_norm: float = option(1.0, parsing.number(0.0), "Gradients are scaled down to this norm; 0 leaves them.")
    bf16: bool | None = option(None, parsing.flag(), "Multiply in bfloat16. Left out: where the processor has it.")
    gradient_checkpointing: bool = option(False, parsing.flag(), "Recompute activations: less memory, a third slower.")
    eval_steps: int | None = option(None, parsing.integer(1), "Validate every N steps. Left out: ten times in the run.")
    early_stopping_patience: int = option(
        3, parsing.integer(0), "Stop after N validations without a better one; 0 never does."
    )
    seed: int = option(0, parsing.integer(0, parsing.MAX_SEED), SEED_HELP)


@dataclass
class DistillConfig(Stage):
    """Learning from the dense model."""

    teacher: str | None = option(None, parsing.path(), "The dense model: learn its most likely tokens too.")
    distill_weight: float = option(0.5, parsing.fraction(), "Its share of the loss; the rest is the text's.")
    distill_top_k: int = option(64, parsing.integer(1), "Tokens of which its probability is kept at each position.")
    distill_temperature: float = option(1.0, parsing.positive(), "Softens both distributions.")
    distill_cache: str | None = option(
        None, parsing.path(), "Folder where its answers stay for later runs. Left out: gone with the run."
    )


@dataclass
class ResumeConfig(Stage):
    """Going on after an interruption."""

    preset: str | None = option(None, parsing.choice(*PRESETS), "Published settings; other options win over them.")
    resume: bool = option(False, parsing.flag(), "Go on from the last checkpoint of the same command.")
    checkpoint_dir: str | None = option(
        None, parsing.path(), "Where checkpoints lie until the end. Left out: OUTPUT_DIR.unfinished."
    )

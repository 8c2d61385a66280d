"""Tiny models and text for training, and a trainer on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers_run import byte_tokenizer, tiny_llama

from pyprune.recovery import adapter
from pyprune.recovery.examples import Encoder
from pyprune.recovery.packing import IGNORED, Row, rows_of
from pyprune.recovery.processes import Processes
from pyprune.recovery.train import Trainer, Training

LORA = adapter.Lora(r=4, alpha=8, dropout=0.0, targets="all-linear")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def small_llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of 2 layers and hidden size 32 for :func:`byte_tokenizer`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    return tiny_llama(seed, **{**sizes, **changes})


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Plain records of some 30 to 60 bytes that a tiny model learns something of."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "house", "river", "stone", "walks", "sleeps", "over", "under"]
    return [{"text": " ".join(rng.choice(words, rng.integers(6, 10)))} for _ in range(count)]


def rows(count: int = 40, cutoff: int = 64, packing: bool = True, seed: int = 0) -> list[Any]:
    encode = Encoder(byte_tokenizer())
    return rows_of([encode(r, "here") for r in sentences(count, seed)], cutoff, packing)


def other_rows(count: int = 40) -> list[Any]:
    """Rows of tokens that the sentences never have: learning them unlearns the sentences."""
    return [Row(r.ids % 50 + 200, np.where(r.labels < 0, IGNORED, r.ids % 50 + 200), r.positions) for r in rows(count)]


def training(**changes: Any) -> Training:
    options: dict[str, Any] = {
        "learning_rate": 5e-3, "lr_scheduler": "cosine", "warmup_steps": 1, "train_batch_size": 4,
        "micro_batch_size": 2, "max_grad_norm": 1.0, "bf16": False, "gradient_checkpointing": False, "eval_steps": 5,
        "early_stopping_patience": 0, "max_minutes": None, "seed": 0,
    }  # fmt: skip
    return Training(**{**options, **changes})


def trainer(wrapped: Any, train: Any = None, validation: Any = None, **changes: Any) -> Trainer:
    more = {k: changes.pop(k) for k in ("teacher", "unfinished", "positions") if k in changes}
    return Trainer(
        wrapped, rows() if train is None else train, rows(6, seed=9) if validation is None else validation,
        training(**changes), processes=Processes(), **{"positions": True, **more},
    )  # fmt: skip


@torch.no_grad()
def shake(wrapped: Any, size: float = 0.1) -> None:
    """Give the adapter values as if it had been trained: B is zero at first."""
    for p in adapter.state(wrapped).values():
        p.copy_(size * torch.randn_like(p))


@torch.no_grad()
def logits(model: Any, length: int = 24, **more: Any) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) * 7 % 97
    return model(input_ids=ids, use_cache=False, **more).logits

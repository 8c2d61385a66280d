"""The sizes that are measured: those of models that people prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder: ``ffn`` gated channels, ``heads`` query heads of ``head_dim`` on ``kv_heads`` KV heads."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def layer(self) -> dict[str, tuple[int, int]]:
        """Weights [out, in] of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q),
            "gate": (self.ffn, self.hidden), "up": (self.ffn, self.hidden), "down": (self.hidden, self.ffn),
        }  # fmt: skip

    def matrices(self) -> list[tuple[int, int]]:
        """Every matrix of the model."""
        ends = [(self.vocab, self.hidden)] * (1 if self.tied else 2)
        return [*ends, *(shape for _ in range(self.layers) for shape in self.layer().values())]

    def elements(self) -> int:
        """Elements of all matrices."""
        return sum(rows * cols for rows, cols in self.matrices())

    def config(self) -> Any:
        """A LlamaConfig of these sizes."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
        )  # fmt: skip


SHAPES = {
    "llama-7b": Shapes(4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-3-8b": Shapes(4096, 14336, 32, 32, 8, 128, 128256, False),
    "smollm2": Shapes(576, 1536, 30, 9, 3, 64, 49152, True),
    "tiny": Shapes(64, 176, 2, 4, 2, 16, 256, True),
}

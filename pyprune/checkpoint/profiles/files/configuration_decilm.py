"""Configuration of a Llama whose layers have different numbers of KV heads and FFN channels (``block_configs``)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A mapping whose entries are attributes too, as programs that serve DeciLM models read them."""

    def __init__(self, values: Any) -> None:
        super().__init__({name: Block(v) if isinstance(v, dict) else v for name, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """``block_configs[i].attention.n_heads_in_group``: query heads on one KV head; ``.ffn.ffn_mult``: see below;
    ``no_op`` of either: the layer is without it."""

    model_type = "nemotron-nas"
    block_configs: Any = None

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        self.block_configs = [Block(block) for block in self.block_configs or []]

    def kv_heads(self, index: int) -> int:
        """KV heads of a layer."""
        return self.num_attention_heads // self.block_configs[index].attention.n_heads_in_group

    def ffn_channels(self, index: int) -> int:
        """FFN channels of a layer: 2/3 * ffn_mult * hidden size, up to the next multiple of 256."""
        size = int(2 * self.block_configs[index].ffn.ffn_mult * self.hidden_size / 3)
        return -(-size // 256) * 256

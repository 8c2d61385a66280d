"""A greedy continuation, to see what a model still says."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = 32) -> str:
    """What ``model`` says after ``prompt``: at most ``tokens`` tokens, greedy, without special tokens.

    Args:
        model: a transformers causal LM; its mode (train or eval) is restored afterwards.
    """
    from transformers import GenerationConfig

    training = model.training
    model.eval()
    try:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        kept = model.generation_config
        # The checkpoint's own sampling settings would be warned about, one by one, in a greedy run.
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
        out = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=greedy
        )
    finally:
        model.train(training)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

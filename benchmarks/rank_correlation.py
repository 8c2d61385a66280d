"""What a criterion's ranking is worth: rank correlation with the loss that the removal of each unit alone costs.

    python benchmarks/rank_correlation.py                 # a small Llama, trained here on the standard library's help
    python benchmarks/rank_correlation.py --model FOLDER  # a model of your own

Every sampled unit is removed (its weights set to zero; a layer passed by), the loss is measured on text that neither
training nor calibration has seen, the unit is put back. Spearman's coefficient compares the increase with the scores:
over all units of a role, and as the mean over layers of the coefficient within each layer. 1 is a perfect ranking.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import pyprune
from pyprune.discovery.groups import Group, Groups
from pyprune.importance.depth import LAYER_CRITERIA, score_layers, without_layers
from pyprune.importance.registry import CRITERIA, get_criterion


def trained(steps: int, seed: int) -> torch.nn.Module:
    """A Llama of 6 layers (hidden 96, FFN 192, 8 query heads on 4 KV heads, bytes as tokens), trained with AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text, generator = text_tokens()[:-100_000], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = rows(text, 16, 128, generator)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"  step {step + 1}: {loss.item():.3f} nats a byte", flush=True)
    return model.eval()


def text_tokens(tokenizer: object | None = None) -> torch.Tensor:
    """The standard library's help topics as one stream of tokens: bytes without a tokenizer."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    if tokenizer is None:
        return torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64)
    return tokenizer(text, return_tensors="pt").input_ids[0]  # type: ignore[operator]


def rows(stream: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops [count, length] of a stream."""
    starts = torch.randint(len(stream) - length, (count,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()])


@torch.no_grad()
def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of tokens 2.. of each row, nats, summed in float64."""
    total = 0.0
    for part in ids.split(16):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").double().sum())
    return total / (ids.shape[0] * (ids.shape[1] - 1))


@contextmanager
def without_unit(model: torch.nn.Module, group: Group, unit: int) -> Iterator[None]:
    """Within it the unit's slices are zero; a layer is passed by."""
    if group.role == "layers":
        with without_layers([model.get_submodule(group.modules[unit])]):
            yield
        return
    aside = []
    with torch.no_grad():
        for member in group.members:
            weight = model.get_parameter(member.tensor)
            places = torch.from_numpy(member.index.positions()[:, unit].reshape(-1).copy())
            aside.append((weight, member.dim, places, weight.index_select(member.dim, places)))
            weight.index_fill_(member.dim, places, 0.0)
        try:
            yield
        finally:
            for weight, dim, places, values in reversed(aside):
                weight.index_copy_(dim, places, values)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's coefficient of the ranks; NaN for fewer than three or constant values."""
    if len(a) < 3 or len(set(a)) == 1:
        return math.nan
    first, second = (np.argsort(np.argsort(np.asarray(v))) for v in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def increases(model: torch.nn.Module, groups: Groups, ids: torch.Tensor, channels: int) -> dict[str, dict[int, float]]:
    """Group name -> unit -> loss increase, for all heads and layers and ``channels`` FFN channels of each layer."""
    dense = loss_of(model, ids)
    generator = torch.Generator().manual_seed(1)
    out: dict[str, dict[int, float]] = {}
    for group in groups.prunable(["kv_heads", "ffn", "layers"]):
        units = range(group.units)
        if group.role == "ffn":
            units = sorted(torch.randperm(group.units, generator=generator)[:channels].tolist())
        out[group.name] = {}
        for unit in units:
            with without_unit(model, group, unit):
                out[group.name][unit] = loss_of(model, ids) - dense
    return out


def correlations(groups: Groups, scores: pyprune.Scores, true: dict[str, dict[int, float]], role: str) -> list[float]:
    """[over all units, mean within layers] for the groups of a role."""
    pairs = [
        ([float(scores[g.name][0, u]) for u in true[g.name]], list(true[g.name].values()))
        for g in groups.prunable([role])
        if g.name in scores
    ]
    if not pairs:
        return [math.nan, math.nan]
    inside = [spearman(a, b) for a, b in pairs]
    ours, measured = ([v for pair in pairs for v in pair[i]] for i in (0, 1))
    return [spearman(ours, measured), float(np.mean(inside))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal LM; left out: a small one is trained")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the small one")
    parser.add_argument("--channels", type=int, default=32, help="FFN channels removed in each layer")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--windows", type=int, default=16, help="windows that the loss is measured on")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    start, tokenizer = os.times(), None
    clock = time.perf_counter()
    if asked.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        model = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    else:
        model = trained(asked.steps, asked.seed)
    held = text_tokens(tokenizer)[-100_000:] if tokenizer is None else text_tokens(tokenizer)
    half, generator = len(held) // 2, torch.Generator().manual_seed(asked.seed)
    calibration = rows(held[:half], asked.samples, asked.length, generator)
    ids = rows(held[half:], asked.windows, asked.length, generator)
    groups = pyprune.discover(model)
    print(f"loss on the held-out text: {loss_of(model, ids):.4f} nats a token", flush=True)
    true = increases(model, groups, ids, asked.channels)

    print("| criterion | FFN channels | in a layer | KV heads | in a layer | layers |\n|---|---|---|---|---|---|")
    for name in CRITERIA:
        found: list[float] = []
        for role in ("ffn", "kv_heads", "layers"):
            if not groups.prunable([role]) or (role == "layers" and get_criterion(name).units is not None):
                found += [math.nan] * 2
                continue
            try:
                scores = pyprune.score(model, groups, calibration, name, roles=[role], seed=asked.seed, progress=False)
            except pyprune.PyPruneError:  # a criterion of experts, say
                found += [math.nan] * 2
                continue
            found += correlations(groups, scores, true, role)
        print(row(name, found[:5]), flush=True)
    layers = groups.prunable(["layers"])[0]
    for name in LAYER_CRITERIA:
        scores = score_layers(model, layers, calibration, 1, name, progress=False)
        print(row(name, [math.nan] * 4 + correlations(groups, scores, true, "layers")[:1]), flush=True)
    end = os.times()
    used = end.user + end.system - start.user - start.system
    units = sum(len(v) for v in true.values())
    print(f"{units} units removed one by one; {used:.0f} s of processor time, {time.perf_counter() - clock:.0f} s")


def row(name: str, values: Sequence[float]) -> str:
    """A line of the table; what a criterion does not score stays empty."""
    return f"| {name} | " + " | ".join("" if math.isnan(v) else f"{v:.2f}" for v in values) + " |"


if __name__ == "__main__":
    main()

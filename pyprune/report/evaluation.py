"""The figures of ``pyprune eval`` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pyprune.units import count, perplexity, seconds, size

Row = tuple[str, str, str]  # label, value, key of its ratio or ""


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """The figures of one model, each with its protocol, and what the stages took."""
    table = Table(title=Text(f"{result['model']} ({result['model_class']})"), title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for label, value, _ in _rows(result):
        table.add_row(Text(label), Text(value))
    for label, protocol in _protocols(result):
        table.add_row(label, Text(protocol))
    said = result["continuation"]
    if said is not None:
        table.add_row("prompt", Text(said["prompt"]))
        table.add_row("continuation", Text(said["text"]))
    for note in result.get("warnings", ()):
        table.add_row("note", Text(note))
    for stage in result["stages"]:
        table.add_row(Text(stage["name"]), f"{seconds(stage['seconds'])}, peak memory {size(stage['peak_memory'])}")
    return table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """A model beside the one in ``result["compare"]``, with ratios model / other."""
    other, ratios = result["compare"], result["ratios"]
    table = Table(title="Side by side", title_justify="left", caption_justify="left")
    table.add_column("")
    for one in (other, result):
        table.add_column(Text(f"{one['model']} ({one['model_class']})"), justify="right", overflow="fold")
    table.add_column("ratio", justify="right")
    for (label, before, key), (_, after, _) in zip(_rows(other), _rows(result), strict=True):
        ratio = ratios.get(key)
        table.add_row(Text(label), before, after, "" if ratio is None else f"{ratio:.3f}")
    if result["continuation"] is not None:
        texts = [Text(one["continuation"]["text"], justify="left") for one in (other, result)]
        table.add_row(Text(f"after {result['continuation']['prompt']!r}"), *texts, "")
    lines = [f"{label}: {protocol}" for label, protocol in _protocols(result)]
    notes = {note for one in (other, result) for note in one.get("warnings", ())}
    table.caption = Text("\n".join([*lines, *(f"note: {note}" for note in sorted(notes))]))
    return table


def _rows(result: Mapping[str, Any]) -> Iterator[Row]:
    yield "parameters", f"{result['parameters']:,}", "parameters"
    yield "size on disk", size(result["weights_bytes"]), "weights_bytes"
    if result["perplexity"] is not None:
        yield "perplexity", perplexity(result["perplexity"]["perplexity"]), "perplexity"
    yield from _accuracies(result.get("tasks") or ())
    speed, needs = result.get("speed"), result.get("footprint")
    if speed is not None:
        for key, label in (("prefill", "prefill, tokens/s"), ("decode", "decode, tokens/s")):
            yield label, f"{speed[key]:,.1f} ± {speed[key + '_spread']:,.1f}", key
        times = (1000 * speed[key] for key in ("first_token", "first_token_spread"))
        yield "first token, ms", " ± ".join(f"{t:,.1f}" for t in times), "first_token"
    if needs is not None:
        yield "weights in memory", size(needs["weights_bytes"]), ""
        yield "KV cache a token", size(needs["cache_bytes_per_token"]), "cache_bytes_per_token"
        if needs["state_bytes"]:
            yield "recurrent state", size(needs["state_bytes"]), "state_bytes"
        yield "peak memory of the process", size(needs["peak_memory"]), "peak_memory"
        if needs["peak_gpu_memory"] is not None:
            yield "peak GPU memory", size(needs["peak_gpu_memory"]), ""
        yield "MACs a token", count(needs["macs_per_token"]), "macs_per_token"
        attention = needs["attention_macs_per_position"]
        yield "and for each position attended to", count(attention), "attention_macs_per_position"


def _accuracies(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for one in tasks:
        for key in ("acc", "acc_norm"):
            if one[key] is not None:
                error = one[f"{key}_stderr"]
                shown = f"{one[key]:.4f}" + ("" if error is None else f" ± {error:.4f}")
                yield f"{one['task']} {key} ({one['questions']:,})", shown, f"{one['task']} {key}"
    if len(tasks) > 1:
        yield "mean acc", f"{sum(one['acc'] for one in tasks) / len(tasks):.4f}", ""
        if all(one["acc_norm"] is not None for one in tasks):
            yield "mean acc_norm", f"{sum(one['acc_norm'] for one in tasks) / len(tasks):.4f}", ""


def _protocols(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if result["perplexity"] is not None:
        yield "perplexity on", result["perplexity"]["protocol"]
    if result.get("speed") is not None:
        yield "speed of", result["speed"]["protocol"] + "; ± is the distance between the quartiles"
    if result.get("tasks"):
        yield "tasks", "zero-shot, acc and acc_norm as lm-evaluation-harness defines them; ± is the standard error"

"""Pages read the way a browser reads them: elements, visible text, and whatever they would fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pyprune.report.html import Sources

VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHING = ("src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href")


class Page(HTMLParser):
    """A parsed document.

    Attributes:
        elements: (tag, attributes) of every element, in order.
        texts: text by the ``id`` of the section that it stands in ("" outside).
        unbalanced: end tags that close nothing, and elements that nothing closes.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.unbalanced: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        self.unbalanced += [tag for tag, _ in self._open]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            inside = self._open[-1][1] if self._open else ""
            self._open.append((tag, found.get("id") or inside if tag == "section" else inside))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()
        else:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        section = self._open[-1][1] if self._open else ""
        if not self._open or self._open[-1][0] != "style":
            self.texts[section] = self.texts.get(section, "") + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def outside(self) -> list[str]:
        """Whatever a browser would fetch or run: addresses, imports, scripts, handlers."""
        found = [f"<{tag}>" for tag, _ in self.elements if tag in ("script", "iframe", "object", "embed", "base")]
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                text = value or ""
                if name.startswith("on") or (name == "http-equiv" and text.lower() == "refresh"):
                    found.append(f"{tag} {name}={text}")
                if (name in FETCHING or name == "href") and not text.startswith(("#", "data:")):
                    found.append(f"{tag} {name}={text}")
                if name == "style" and re.search(r"url\(|@import|expression", text):
                    found.append(f"{tag} style={text}")
        for style in re.findall(r"(?s)<style>(.*?)</style>", self.source):
            found += re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", style)
        return found


def read_page(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def evaluation(model: str, **changes: Any) -> dict[str, Any]:
    """What ``pyprune eval --output`` writes about a model, with made-up figures."""
    speed = {
        "prefill": 200.0, "prefill_spread": 2.0, "decode": 20.0, "decode_spread": 0.5, "first_token": 0.5,
        "first_token_spread": 0.01, "protocol": "stock generate, greedy, batch 1",
    }  # fmt: skip
    task = {
        "task": "piqa", "questions": 200, "acc": 0.625, "acc_stderr": 0.034, "acc_norm": 0.65, "acc_norm_stderr": 0.033,
    }  # fmt: skip
    needs = {
        "parameters": 1000, "weights_bytes": 4000, "cache_bytes_per_token": 1024.0, "state_bytes": 0,
        "macs_per_token": 2000, "attention_macs_per_position": 10, "peak_memory": 10**8, "peak_gpu_memory": None,
    }  # fmt: skip
    figure = {"perplexity": 20.0, "nll": 3.0, "protocol": "other.txt: 2 windows of 64 tokens"}
    result = {
        "model": model, "model_class": "LlamaForCausalLM", "parameters": 1000, "weights_bytes": 4096,
        "perplexity": figure, "continuation": None, "tasks": [task], "speed": speed, "footprint": needs, "stages": [],
    }  # fmt: skip
    return {**result, **changes}


def figure(value: float | None) -> dict[str, Any]:
    return {"perplexity": value, "nll": 3.0, "protocol": "test.txt: 8 windows of 1024 tokens"}


def sources() -> Sources:
    """Everything that a page can show, of a model with two layers."""
    counts = {"before": 1_000_000, "after": 800_000, "ratio": 0.2}
    stage = {"name": "score", "seconds": 1.5, "peak_memory": 2**30, "peak_gpu_memory": None}
    report = {
        "model": "some/model", "model_class": "LlamaForCausalLM", "seconds": 75.0, "peak_memory": 2**30,
        "parameters": {"with_embeddings": counts, "without_embeddings": counts},
        "weights_bytes": {"before": 4 * 2**20, "after": 3 * 2**20},
        "perplexity": {"before": figure(20.0), "after": figure(30.0)}, "stages": [stage], "warnings": ["mind the gap"],
        "plan": {
            "asked": {"ratio": 0.2, "target_params": None, "widths": {"ffn": 0.5}, "iterative_steps": 3},
            "allocation": "global", "allocation_criterion": "group_fisher", "count_embeddings": True,
            "roles": ["kv_heads", "ffn"], "layers": [0, 1], "round_to": {"ffn": 64},
            "min_keep": {"kv_heads": 1, "ffn": 0.1},
        },
        "scores": {
            "criterion": "wanda", "aggregation": "sum", "route": "activations",
            "calibration": {"source": "train.txt", "samples": 32, "length": 128, "seed": 7},
        },
        "compensation": [{"mode": "least-squares", "target": "own", "matrices": [{}, {}], "notes": []}],
        "recipe": {"dtype": "auto", "device": "cpu"}, "versions": {"pyprune": "1.2.3", "torch": "2.13"},
    }  # fmt: skip
    recovery = {
        "what": "Trained after pruning: LoRA of rank 8 on `data.jsonl`.", "steps": 10, "planned_steps": 20,
        "tokens": 5000, "seconds": 61.0, "learning_rate": 1e-3, "adapter_parameters": 123, "warnings": [],
        "data": [{"source": "data.jsonl"}], "stages": [{**stage, "name": "train", "peak_gpu_memory": 2**20}],
        "perplexity": {"before": figure(30.0), "after": figure(22.5)},
        "validation": {"before": {"perplexity": 31.0}, "after": {"perplexity": 24.0}, "best_step": 10},
        "validations": [{"step": 0, "perplexity": 31.0}, {"step": 10, "perplexity": 24.0}],
        "versions": {"peft": "0.17"},
    }  # fmt: skip
    widths = [
        {"role": role, "layer": i, "before": before, "after": after}
        for role, before, after in (("kv_heads", 4, 3), ("ffn", 192, 100)) for i in range(2)
    ]  # fmt: skip
    spread = {"least": 1e-3, "median": 0.1, "greatest": 1.0}
    roles = [
        {"role": "kv_heads", "mode": "units", "scale": "log",
         "rows": [{"layer": i, **spread, "scores": [0.1, 1e-3, 0.5, 1.0], "kept": [1, 0, 1, 1]} for i in range(2)]},
        {"role": "ffn", "mode": "bins", "scale": "log", "edges": [1e-3, 0.01, 0.1, 1.0],
         "rows": [{"layer": i, **spread, "kept": [0, 20, 80], "removed": [62, 30, 0]} for i in range(2)]},
    ]  # fmt: skip
    names = {key: key for key in ("dense", "pruned", "recovered")}
    return Sources(
        columns=names, report=report, recovery=recovery, widths=widths,
        importance={"criterion": "wanda", "roles": roles}, evaluations=[("pruned", evaluation("smaller"))],
        samples=[{"prompt": "The capital", "dense": " is Paris.", "pruned": " of", "recovered": ""}],
        recipes=[("pyprune_recipe.yaml", "ratio: 0.2\n")], commands=[("prune", "pyprune prune some/model --ratio 0.2")],
    )  # fmt: skip

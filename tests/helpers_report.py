"""Pages read the way a browser reads them: elements, visible text, and whatever they would fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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

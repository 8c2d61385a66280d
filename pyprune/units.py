"""Quantities as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def size(count: float) -> str:
    """Bytes in binary units: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def seconds(duration: float) -> str:
    """0.25 -> "0.25 s", 75.2 -> "1 min 15 s"."""
    if duration < 60:
        return f"{duration:.2f} s" if duration < 10 else f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest} s"


def perplexity(value: float | None) -> str:
    """12.345 -> "12.35"; None is one that overflows."""
    return "overflow" if value is None else f"{value:.2f}"


def count(number: float) -> str:
    """Large counts in decimal units: 1.345e8 -> "134.5 M"."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.2f} G"


def spans(indices: Iterable[int]) -> str:
    """Ascending indices: (4, 5, 6, 9) -> "4-6,9"."""
    out: list[list[int]] = []
    for i in indices:
        if out and out[-1][1] == i - 1:
            out[-1][1] = i
        else:
            out.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)

"""The one exception that users see for their own mistakes: which option, which value, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class PyPruneError(ValueError):
    """A mistake in the input, with the way out.

    Args:
        option: the parameter's Python name, for example ``"ratio"`` (the command line shows it as ``--ratio``).
        value: what was given; shown as ``repr`` when it is short. ``None`` leaves it out.
        problem: what is wrong, as the end of a sentence.
        hint: what to do instead.
    """

    def __init__(self, option: str, value: Any, problem: str, hint: str = "") -> None:
        self.option, self.value, self.problem, self.hint = option, value, problem, hint
        super().__init__(self.render(option))

    def render(self, label: str) -> str:
        """The one-line message, with the option spelled as ``label``."""
        shown = "" if self.value is None else f" {_short(self.value)}"
        hint = f" {self.hint}" if self.hint else ""
        return " ".join(f"{label}{shown}: {self.problem}.{hint}".split())


def unknown_name(option: str, value: str, known: Iterable[str]) -> PyPruneError:
    """The error for a name that is in no registry; suggests the nearest one."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return PyPruneError(option, value, "is not known", f"{hint}Known: {', '.join(names)}.")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):  # as it is written
        text = ",".join(f"{key}={one}" for key, one in value.items())
    else:
        text = str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

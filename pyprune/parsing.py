"""Parsers of option values: the same text means the same thing as a flag, in YAML and in Python."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyprune.errors import PyPruneError, unknown_name

PROFILES = ("uniform", "hetero-hf", "hetero-decilm", "gguf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1  # of PyTorch's generators


@dataclass(frozen=True)
class Parser:
    """Turns what was given into a value.

    Attributes:
        convert: value -> value; raises ValueError or TypeError for what it cannot use.
        must: what the value must be, as the end of "must be ...".
        metavar: how the help shows the value.
        hint: what to do instead.
        plain: value -> what YAML and JSON hold.
        choices: the names that are possible, when they are few and fixed.
        flag: True for yes/no options, which take no value on the command line.
    """

    convert: Callable[[Any], Any]
    must: str
    metavar: str
    hint: str = ""
    plain: Callable[[Any], Any] = lambda value: value
    choices: tuple[str, ...] = ()
    flag: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        """Raises PyPruneError naming the option, the value and what it must be."""
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise unknown_name(name, value, self.choices)
        try:
            return self.convert(value)
        except PyPruneError:
            raise
        except (ValueError, TypeError, OverflowError):
            raise PyPruneError(name, value, f"must be {self.must}", self.hint) from None


def text() -> Parser:
    return Parser(_string, "text", "TEXT")


def choice(*names: str) -> Parser:
    return Parser(_string, "one of " + ", ".join(names), "|".join(names), choices=names)


def path() -> Parser:
    """A folder or file as a string, with ``~`` expanded; ``os.PathLike`` is accepted."""
    return Parser(lambda v: os.path.expanduser(_string(os.fspath(v))), "a path", "PATH")


def source() -> Parser:
    """Text by name (file or dataset), or from Python any object that the reader accepts (tensors, iterables)."""
    return Parser(
        lambda v: os.path.expanduser(_string(os.fspath(v))) if isinstance(v, (str, os.PathLike)) else v,
        "a file or a dataset name",
        "FILE|DATASET",
        plain=lambda v: v if isinstance(v, str) else None,
    )


def sources() -> Parser:
    """One or several sources, each with a weight or none: ``a.jsonl=3,b.txt=1``, a mapping, a list; objects in Python.

    Gives a tuple of (source, weight or None).
    """

    def name(value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            return os.path.expanduser(_string(os.fspath(value)).strip())
        return value

    def weight(value: Any) -> float | None:
        found = None if value is None else float(value)
        if found is not None and not 0 < found < math.inf:
            raise ValueError
        return found

    def one(value: Any) -> tuple[Any, float | None]:
        if isinstance(value, str) and not os.path.exists(value) and "=" in value:
            head, _, tail = value.rpartition("=")
            return name(head), weight(tail)
        return name(value), None

    def convert(value: Any) -> tuple[tuple[Any, float | None], ...]:
        if isinstance(value, Mapping):
            found = [(name(k), weight(v)) for k, v in value.items()]
        elif isinstance(value, str):
            found = [one(value)] if os.path.exists(value) else [one(part.strip()) for part in value.split(",")]
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (str, os.PathLike)) for v in value):
            found = [one(v) for v in value]
        elif isinstance(value, tuple) and value and all(isinstance(v, tuple) and len(v) == 2 for v in value):
            found = [(name(k), weight(v)) for k, v in value]
        else:
            found = [one(value)]
        if not found or len({w is None for _, w in found}) > 1:
            raise ValueError
        return tuple(found)

    def plain(value: Any) -> Any:
        if not all(isinstance(source, str) for source, _ in value):
            return None
        return [source if w is None else f"{source}={w:g}" for source, w in value]

    hint = "Write FILE,FILE or FILE=3,FILE=1: a weight for each, or for none."
    return Parser(convert, "files or dataset names", "SOURCE[=WEIGHT],...", hint, plain=plain)


def flag() -> Parser:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

    def convert(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError

    return Parser(convert, "true or false", "", flag=True)


def integer(minimum: int, maximum: int | None = None) -> Parser:
    def convert(value: Any) -> int:
        number = _integer(value)
        if number < minimum or (maximum is not None and number > maximum):
            raise ValueError
        return number

    return Parser(convert, f"a whole number, at least {minimum}" + (f", at most {maximum}" if maximum else ""), "N")


def number(minimum: float) -> Parser:
    def convert(value: Any) -> float:
        found = float(value)
        if isinstance(value, bool) or not minimum <= found < math.inf:
            raise ValueError
        return found

    return Parser(convert, f"a number, at least {minimum:g}", "NUMBER")


def tokens() -> Parser:
    """A number of tokens: 16384, 16k, 2M."""
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

    def convert(value: Any) -> int:
        found = re.fullmatch(r"([0-9.]+)\s*([KMB]?)", str(value).strip().upper().replace("_", ""))
        if isinstance(value, bool) or found is None or round(float(found[1]) * units[found[2]]) < 1:
            raise ValueError
        return round(float(found[1]) * units[found[2]])

    return Parser(convert, "a number of tokens", "N", "Write it as 16384, 16k or 2M.")


def fraction(whole: bool = True) -> Parser:
    """A number from 0 to 1; below 1 unless ``whole``."""

    def convert(value: Any) -> float:
        found = float(value)
        if isinstance(value, bool) or not 0 <= found <= 1 or (found == 1 and not whole):
            raise ValueError
        return found

    return Parser(convert, "a number from 0 to 1" if whole else "at least 0 and below 1", "FRACTION")


def positive() -> Parser:
    def convert(value: Any) -> float:
        found = float(value)
        if isinstance(value, bool) or not 0 < found < math.inf:
            raise ValueError
        return found

    return Parser(convert, "a number above 0", "NUMBER")


def ratio() -> Parser:
    def convert(value: Any) -> float:
        percent = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", value) if isinstance(value, str) else None
        if percent is not None:
            raise PyPruneError("ratio", value, "must be a number", f"Did you mean {float(percent[1]) / 100:g}?")
        return _requests().parse_ratio(_number(value))

    return Parser(convert, "a number", "FRACTION")


def removal() -> Parser:
    """How many go, as a whole number or a fraction of all."""

    def convert(value: Any) -> int | float:
        if isinstance(value, str) and re.fullmatch(r"\s*-[0-9]+\s*", value):
            value = int(value)
        return _requests().parse_removal("remove_layers", _number(value))

    return Parser(convert, "a whole number or a fraction", "N|FRACTION", "Write 3, or 0.2 for a fifth of the layers.")


def count() -> Parser:
    return Parser(lambda v: _requests().parse_count(v), "a number of parameters", "COUNT")


def size() -> Parser:
    """A file size as transformers writes it: 5GB, 500MB."""

    def convert(value: Any) -> str:
        if not re.fullmatch(r"[1-9][0-9]*\s*([KMGT]I?)?B", _string(value).strip().upper()):
            raise ValueError
        return str(value).strip()

    return Parser(convert, "a size", "SIZE", "Write it as 5GB or 500MB.")


def device() -> Parser:
    def convert(value: Any) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", str(value)):
            raise ValueError
        return str(value)

    return Parser(convert, "auto, cpu, cuda or cuda:N", "DEVICE")


def roles() -> Parser:
    """Role names: a list, or text with commas."""
    return Parser(lambda v: tuple(_requests().parse_roles("roles", v)), "role names", "ROLE,...", plain=list)


def layers() -> Parser:
    """Decoder layers as ``select`` takes them; how many the model has is not known yet, so only the form is checked."""

    def convert(value: Any) -> Any:
        _requests().parse_layers(value, 4096)
        return value if isinstance(value, (int, str)) else tuple(value)

    return Parser(convert, "layer indices", "LAYERS", plain=lambda v: list(v) if isinstance(v, tuple) else v)


def names() -> Parser:
    """Names or files: a list, or text with commas."""

    def convert(value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else [os.fspath(v) for v in value]
        found = tuple(os.path.expanduser(_string(part.strip())) for part in parts)
        if not found:
            raise ValueError
        return found

    return Parser(convert, "names or files", "NAME,...", "Separate them by commas.", plain=list)


def prompts() -> Parser:
    """A text file with one prompt a line, by its path, or the prompts themselves as a list."""

    def convert(value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            return os.path.expanduser(_string(os.fspath(value)))
        found = [_string(one) for one in value]
        if not found:
            raise ValueError
        return found

    return Parser(convert, "a text file or a list of texts", "FILE")


def by_role(option: str, check: Callable[[str, Any, str], Any], alone: bool) -> Parser:
    """Role -> number: a mapping, or text such as ``kv_heads=0.5,ffn=5504``; one number for all roles where ``alone``.

    Args:
        option: the option's name, for errors.
        check: (option, number, " for <role>" or "") -> number; raises PyPruneError.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, str) and "=" in value:
            pairs = [part.split("=", 1) for part in value.split(",")]
            roles = [pair[0].strip() for pair in pairs]
            twice = next((role for role in roles if roles.count(role) > 1), None)
            if twice is not None:
                raise PyPruneError(option, value, f"names {twice} twice", "Name each role once.")
            value = dict(pairs)
        if isinstance(value, Mapping):
            if not value:
                raise ValueError
            names = _requests().parse_roles(option, [str(role).strip() for role in value])
            return {n: check(option, _number(v), f" for {n}") for n, v in zip(names, value.values(), strict=True)}
        if not alone:
            raise TypeError
        return check(option, _number(value), "")

    example = "ROLE=N,..."
    return Parser(
        convert,
        "numbers by role",
        f"N|{example}" if alone else example,
        "Write kv_heads=0.5,ffn=5504: a count or a fraction for each role.",
        plain=lambda v: dict(v) if isinstance(v, Mapping) else v,
    )


def amounts(option: str, alone: bool) -> Parser:
    """Units (int) or fractions of them (float), by role."""
    return by_role(option, lambda name, v, where: _requests().parse_amount(name, v, where), alone)


def multiples(option: str) -> Parser:
    """A whole number, at least 1, for all channel roles or by role."""
    return by_role(option, lambda name, v, where: integer(1)(name, v), True)


def _requests() -> Any:
    from pyprune.selection import requests  # it needs numpy, and --help shall not wait for that

    return requests


def _number(value: Any) -> Any:
    """Text as an int when it is written as one, else as a float; anything else as it is."""
    if not isinstance(value, str):
        return value
    return int(value) if re.fullmatch(r"\s*[0-9]+\s*", value) else float(value)


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    return int(value)

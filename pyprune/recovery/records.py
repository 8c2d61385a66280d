"""Training records, from text files, JSON and JSONL files, Hugging Face datasets and Python objects."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.importance.sources import open_dataset

TEXT, JSON, LINES = (".txt", ".txt.gz"), (".json", ".json.gz"), (".jsonl", ".jsonl.gz")
HINT = "Give .jsonl, .json or .txt files (.gz too), or Hugging Face dataset names as owner/name:configuration:split."


def check_source(source: Any, option: str) -> None:
    """What can be told without reading: the file is there and of a kind that can be read.

    Raises:
        PyPruneError: otherwise.
    """
    if isinstance(source, str):
        _kind(source, option)
    elif not isinstance(source, (Tensor, Iterable)) or isinstance(source, (bytes, Mapping)):
        raise PyPruneError(option, type(source).__name__, "is nothing to learn from", HINT)


def name_of(source: Any) -> str:
    """How a source is called in messages and reports."""
    if isinstance(source, str):
        return source if _is_dataset(source) else os.path.basename(source)
    return "token ids" if isinstance(source, Tensor) else "records"


def read_records(source: Any, seed: int, option: str = "data") -> Iterator[tuple[Any, str]]:
    """(record, where it stands) for every record of a source, in its own order; datasets come shuffled.

    Args:
        source: a name, or from Python an iterable of records (mappings or texts), or token ids int64 [N, T].
        seed: of the shuffle of a dataset, which is streamed through a buffer of 10,000 records.
        option: which option it came from, for errors.

    Yields:
        A mapping, a text, or token ids int64 [T].

    Raises:
        PyPruneError: the source is missing, unreadable or empty.
    """
    empty = True
    for record, where in _records(source, seed, option):
        if isinstance(record, str) and not record.strip():
            continue
        empty = False
        yield record, where
    if empty:
        raise PyPruneError(option, name_of(source), "holds no records", "Give a source with text in it.")


def _records(source: Any, seed: int, option: str) -> Iterator[tuple[Any, str]]:
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.is_floating_point() or source.dtype == torch.bool:
            problem = f"are {source.dtype} of shape {list(source.shape)}"
            raise PyPruneError(option, "token ids", problem, "Give integers [samples, length].")
        yield from ((row, f"row {i}") for i, row in enumerate(source.to("cpu", torch.int64)))
        return
    if not isinstance(source, str):
        yield from ((record, f"record {i}") for i, record in enumerate(source))
        return
    kind = _kind(source, option)
    if kind == "dataset":
        yield from _dataset(source, seed, option)
        return
    text = _read(source, option)
    if kind == "text":
        yield text, source
    elif kind == "json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
            problem = f"{line}is not JSON: {_reason(error)}"
            raise PyPruneError(option, source, problem, "A .json file holds a list of records.") from None
        if not isinstance(data, list):
            raise PyPruneError(option, source, "is no list of records", "Give one record a line in a .jsonl file.")
        yield from ((record, f"{source} (record {i})") for i, record in enumerate(data, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line), f"{source} (line {number})"
                except (ValueError, RecursionError) as error:
                    problem = f"line {number} is not JSON: {_reason(error)}"
                    raise PyPruneError(option, source, problem, "Give one record a line.") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "msg", None) or error)


def _kind(source: str, option: str) -> str:
    path, lower = Path(source), source.lower()
    kinds = {"text": TEXT, "json": JSON, "lines": LINES}
    kind = next((k for k, ends in kinds.items() if lower.endswith(ends)), None)
    if path.is_dir():
        raise PyPruneError(option, source, "is a folder, not a file", HINT)
    if path.is_file():
        if kind is None:
            raise PyPruneError(option, source, "is not a kind of file that can be read", HINT)
        return kind
    if kind is not None or not _is_dataset(source):
        raise PyPruneError(option, source, "does not exist", "Check the path.")
    return "dataset"


def _is_dataset(source: str) -> bool:
    file_like = source.lower().endswith((*TEXT, *JSON, *LINES)) or source.startswith((".", "~", os.sep))
    return not file_like and source.count("/") <= 1


def _read(source: str, option: str) -> str:
    try:
        opener = gzip.open if source.lower().endswith(".gz") else open
        with opener(source, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PyPruneError(option, source, f"cannot be read: {reason}", HINT) from None


def _dataset(source: str, seed: int, option: str) -> Iterator[tuple[Any, str]]:
    for number, record in enumerate(open_dataset(source, seed, option), 1):
        yield record, f"{source} (record {number})"

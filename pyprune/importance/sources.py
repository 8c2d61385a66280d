"""Text and tokens by name: text files, JSONL files, token files, Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pyprune.errors import PyPruneError

TEXT_FILES = (".txt", ".txt.gz")
RECORD_FILES = (".jsonl", ".jsonl.gz")
TOKEN_FILES = (".npy", ".safetensors")
HINT = "Give a .txt or .jsonl file (.gz too), a .npy or .safetensors file of token ids, or a Hugging Face dataset name."
NO_TOKENIZER = "Put the tokenizer's files beside the weights, give tokenizer= from Python, or token ids for a text."


def kind_of(source: str, option: str = "calibration") -> str:
    """``"text"``, ``"records"``, ``"tokens"`` or ``"dataset"``, told by the name.

    A name with one of the known endings is a file; anything else that exists is refused; the rest are dataset names,
    optionally with configuration and split: ``owner/name:configuration:split``.

    Raises:
        PyPruneError: the file does not exist, is a folder, or is of a kind that cannot be read.
    """
    path, lower = Path(source), source.lower()
    endings = {"text": TEXT_FILES, "records": RECORD_FILES, "tokens": TOKEN_FILES}
    kind = next((k for k, ends in endings.items() if lower.endswith(ends)), None)
    if kind is not None and path.is_file():
        return kind
    if path.is_dir():
        raise PyPruneError(option, source, "is a folder, not a file", HINT)
    if path.exists():
        raise PyPruneError(option, source, "is not a kind of file that can be read", HINT)
    if "," in source and any(Path(part.strip()).is_file() for part in source.split(",")):
        raise PyPruneError(option, source, "names several files, and is one source", "Join the files first.")
    if kind is not None or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise PyPruneError(option, source, "does not exist", "Check the path.")
    return "dataset"


def read_documents(
    source: str, field: str = "text", seed: int | None = None, option: str = "calibration", *, blank: bool = False
) -> Iterator[str]:
    """The documents of a source: a text file is one, elsewhere each record is one.

    Args:
        source: a name of kind text, records or dataset.
        field: the records' field that holds the text.
        seed: shuffles the records (a dataset is streamed through a buffer of 10,000); None keeps their order.
        option: which option the source came from, for errors.
        blank: whether records without text count too.

    Raises:
        PyPruneError: the source is missing, unreadable, empty, or lacks the field.
    """
    kind = kind_of(source, option)
    empty = True
    if kind == "text":
        documents: Iterator[str] = iter([_read_text(source, option)])
    elif kind == "records":
        documents = _read_records(source, field, seed, option)
    else:
        documents = _read_dataset(source, field, seed, option)
    for document in documents:
        text = bool(document.strip())
        empty = empty and not text
        if text or blank:
            yield document
    if empty:
        raise PyPruneError(option, source, "holds no text", "Give a source with text in it.")


def read_token_file(source: str, option: str = "calibration") -> Tensor:
    """Int64 token ids [N, T] or [T] from a .npy file or from a .safetensors file with one tensor or ``input_ids``.

    Raises:
        PyPruneError: the file cannot be read, or what it holds are not token ids.
    """
    try:
        if source.lower().endswith(".npy"):
            tokens = torch.from_numpy(np.load(source, allow_pickle=False))
        else:
            from safetensors.torch import load_file

            tensors = load_file(source)
            name = "input_ids" if "input_ids" in tensors else next(iter(tensors), None)
            if name is None or (len(tensors) > 1 and name != "input_ids"):
                raise PyPruneError(option, source, "holds no tensor named input_ids", f"It holds: {sorted(tensors)}.")
            tokens = tensors[name]
    except PyPruneError:
        raise
    except Exception as error:  # numpy and safetensors raise several kinds for damaged files
        raise PyPruneError(option, source, f"cannot be read: {error}", HINT) from None
    return check_tokens(tokens, source, option)


def check_tokens(tokens: Tensor, source: str, option: str = "calibration") -> Tensor:
    """``tokens`` as int64 [N, T] or [T].

    Raises:
        PyPruneError: another shape, no elements, or not integers.
    """
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise PyPruneError(option, source, f"holds {tokens.dtype}, not token ids", "Give integers.")
    if tokens.dim() not in (1, 2):
        raise PyPruneError(option, source, f"has shape {list(tokens.shape)}", "Give token ids [samples, length].")
    if tokens.numel() == 0:
        raise PyPruneError(option, source, "is empty", "Give at least one sample.")
    return tokens.to(torch.int64)


def read_tokens(
    source: str, tokenizer: Any = None, field: str = "text", option: str = "calibration", special_tokens: bool = False
) -> Tensor:
    """A whole source as one token stream, int64 [tokens]: what perplexity is measured on.

    Records are joined by blank lines in their order, those without text too (as figures on WikiText are published), and
    tokenised once, with ``special_tokens`` by the tokenizer's own rule for them, else without any.

    Raises:
        PyPruneError: the source cannot be read, or there is no tokenizer for text.
    """
    if kind_of(source, option) == "tokens":
        return read_token_file(source, option).reshape(-1)
    text = "\n\n".join(read_documents(source, field, None, option, blank=True))
    return encode(tokenizer, text, source, option, special_tokens)


def encode(tokenizer: Any, text: str, source: str, option: str = "calibration", special_tokens: bool = False) -> Tensor:
    """Int64 token ids [tokens] of a text, with or without the tokenizer's special tokens."""
    if tokenizer is None:
        raise PyPruneError(option, source, "is text, and there is no tokenizer", NO_TOKENIZER)
    text = well_formed(text)
    ids = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64).reshape(-1)


def well_formed(text: str) -> str:
    """``text`` as tokenizers take it: half a surrogate pair, as JSON and bytes that are no UTF-8 give, is replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_prefix(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer puts before every text of its own accord: a BOS token (Llama, Gemma) or none."""
    if tokenizer is None:
        return []
    probe = "1"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(probe)["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((at for at in starts if whole[at : at + len(bare)] == bare), 0)]


def asked_prefix(tokenizer: Any, option: str) -> list[int]:
    """:func:`text_prefix` where ``option`` asks for it; raises PyPruneError where there is none."""
    prefix = text_prefix(tokenizer)
    if not prefix:
        raise PyPruneError(option, True, "adds nothing: the tokenizer puts no token before texts", "Leave it out.")
    return prefix


def behind_prefix(prefix: Sequence[int], length: int, option: str) -> int:
    """Tokens of text in a sequence of ``length`` tokens that begins with ``prefix``; raises PyPruneError naming
    ``option``, which gave the length, where there are none."""
    if length <= len(prefix):
        problem = f"leaves no text behind the {len(prefix)} tokens that the tokenizer puts before it"
        raise PyPruneError(option, length, problem, "Give a greater length.")
    return length - len(prefix)


def _open(source: str) -> IO[str]:
    if source.lower().endswith(".gz"):
        return gzip.open(source, "rt", encoding="utf-8")
    return open(source, encoding="utf-8")


def _unreadable(option: str, source: str, error: Exception) -> PyPruneError:
    reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    return PyPruneError(option, source, f"cannot be read: {reason}", HINT)


def _read_text(source: str, option: str) -> str:
    try:
        with _open(source) as file:
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(option, source, error) from None


def _read_records(source: str, field: str, seed: int | None, option: str) -> Iterator[str]:
    lines = [(n, line) for n, line in enumerate(_read_text(source, option).split("\n"), 1) if line.strip()]
    order = range(len(lines)) if seed is None else _permutation(len(lines), seed)
    for i in order:
        number, line = lines[i]
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise PyPruneError(
                option, source, f"line {number} is not JSON: {reason}", "Give one record a line."
            ) from None
        yield _field_of(record, field, f"{source} (line {number})", option)


def _read_dataset(source: str, field: str, seed: int | None, option: str) -> Iterator[str]:
    for record in open_dataset(source, seed, option):
        yield _field_of(record, field, source, option)


def open_dataset(source: str, seed: int | None, option: str) -> Iterator[Any]:
    """The records of a Hugging Face dataset, ``owner/name:configuration:split``, as they arrive.

    Args:
        seed: of a shuffle within 10,000 records; None leaves them in their order.

    Raises:
        PyPruneError: it cannot be opened, or the package is missing.
    """
    try:
        import datasets
    except ImportError:
        raise PyPruneError(
            option, source, "is no file, and Hugging Face datasets need the package 'datasets'",
            "Check the path, or pip install datasets.",
        ) from None  # fmt: skip
    name, configuration, split = (*source.split(":"), "", "")[:3]
    try:
        records = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        if seed is not None:
            records = records.shuffle(seed=seed, buffer_size=10_000)
        iterator = iter(records)
        first = next(iterator, None)
    except Exception as error:  # network, hub and builder errors are of many unrelated kinds
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise PyPruneError(
            option, source, f"is neither a file nor a dataset that can be opened: {first_line}",
            "Check the path, or the dataset's name and the network; write owner/name:configuration:split.",
        ) from None  # fmt: skip
    while first is not None:
        yield first
        first = next(iterator, None)


def _field_of(record: Any, field: str, where: str, option: str) -> str:
    if not isinstance(record, dict):
        raise PyPruneError(option, where, f"has no text in a field {field!r}", "Records are JSON objects.")
    if field not in record:
        named = "eval_text_field" if option == "eval_text" else "text_field"
        hint = f"It has: {', '.join(map(str, record)) or 'none'}. Name it with {named}."
        raise PyPruneError(option, where, f"has no text in a field {field!r}", hint)
    if not isinstance(record[field], str):
        problem = f"the field {field!r} holds {_kind(record[field])}, not text"
        raise PyPruneError(option, where, problem, "Give text, or leave the record out.")
    return record[field]


def _kind(value: Any) -> str:
    """What a JSON value is called."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number")


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

"""Multiple-choice questions in local files, and the accuracy of a model on them.

A task file is JSONL, gzipped when its name ends in ``.gz``, with one question a line:

    {"context": "Question: What is frozen water?\\nAnswer:", "choices": ["ice", "steam"], "label": 0}

The model is asked how likely each choice is, after one space, as the continuation of the context. With log p the sum
over the tokens of the choice and the characters counted without that space, the definitions of lm-evaluation-harness
are

    acc      = fraction of questions where  argmax_c log p(" " + choice_c | context)                   is the label
    acc_norm = fraction of questions where  argmax_c log p(" " + choice_c | context) / characters(c)   is the label

The first of equal choices is taken. The standard error is that of a mean: sqrt(a (1 - a) / (n - 1)).
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError

ENDINGS = (".jsonl", ".jsonl.gz")
FIELDS = ("context", "choices", "label")
FORM = 'Write {"context": "...", "choices": ["...", "..."], "label": 0}, one question a line.'


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations (without the space before them), and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """A named list of questions."""

    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Accuracy:
    """How many questions a model answers, as fractions.

    Attributes:
        task: name of the task.
        acc: by log-likelihood; ``acc_stderr`` is its standard error, None for a single question.
        acc_norm: by log-likelihood a character, and its standard error; None where a task does not define it.
        questions: how many were asked.
        source: the task file, or ``lm-eval`` for a task by its name there.
    """

    task: str
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    questions: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_task_file(name: str) -> bool:
    """Whether a task is given as a file, told by its ending."""
    return name.lower().endswith(ENDINGS)


def read_task(file: str, limit: int | None = None) -> Task:
    """The questions in a task file, named after it; the first ``limit`` only when given.

    Every line is checked, also those past the limit.

    Raises:
        PyPruneError: the file is missing, unreadable or empty, or a line is not a question; file, line and field are
            named.
    """
    questions = []
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            questions.append(_question(line, f"{file} (line {number})"))
    if not questions:
        raise PyPruneError("tasks", file, "holds no questions", FORM)
    name = os.path.basename(file)
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
            break
    return Task(name, tuple(questions[:limit]))


def _lines(file: str) -> list[str]:
    if not Path(file).is_file():
        problem = "is a folder, not a file" if Path(file).is_dir() else "does not exist"
        raise PyPruneError("tasks", file, problem, "Check the path.")
    try:
        opener = gzip.open if file.lower().endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8", newline="\n") as stream:
            return [*stream]
    except UnicodeDecodeError:
        raise PyPruneError("tasks", file, "cannot be read: it is not UTF-8 text", FORM) from None
    except (OSError, EOFError, zlib.error) as error:
        raise PyPruneError("tasks", file, f"cannot be read: {error}", "Check the file.") from None


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PyPruneError("tasks", where, f"is not JSON: {getattr(error, 'msg', error)}", FORM) from None
    if not isinstance(record, dict):
        raise PyPruneError("tasks", where, "is not a JSON object", FORM)
    for field in FIELDS:
        if field not in record:
            has = f"It has: {', '.join(map(str, record))}. " if record else ""
            raise PyPruneError("tasks", where, f"has no field {field!r}", has + FORM)
    context, choices, label = (record[field] for field in FIELDS)
    if not isinstance(context, str):
        raise PyPruneError("tasks", where, "field 'context' is not text", FORM)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise PyPruneError(
            "tasks", where, "field 'choices' is not a list of two or more texts, none of them empty", FORM
        )
    if isinstance(label, bool) or not isinstance(label, int):
        problem = f"field 'label' is {label!r}, not the index of a choice"
        raise PyPruneError("tasks", where, problem, "Count choices from 0.")
    if not 0 <= label < len(choices):
        problem = f"field 'label' is {label}, and there are {len(choices)} choices"
        raise PyPruneError("tasks", where, problem, f"Count from 0: 0 to {len(choices) - 1}.")
    return Question(context, tuple(choices), label)


def requests_of(task: Task) -> list[tuple[str, str]]:
    """(context, continuation) of every choice of every question, in order."""
    return [(q.context, " " + choice) for q in task.questions for choice in q.choices]


def accuracy(task: Task, loglikelihoods: Sequence[float], source: str) -> Accuracy:
    """The accuracy that log-likelihoods, in the order of :func:`requests_of`, give."""
    right = right_norm = at = 0
    for question in task.questions:
        values = loglikelihoods[at : at + len(question.choices)]
        at += len(question.choices)
        normed = [v / len(choice) for v, choice in zip(values, question.choices, strict=True)]
        right += _first_largest(values) == question.label
        right_norm += _first_largest(normed) == question.label
    count = len(task.questions)
    acc, norm = right / count, right_norm / count
    return Accuracy(task.name, acc, _stderr(acc, count), norm, _stderr(norm, count), count, source)


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _stderr(fraction: float, count: int) -> float | None:
    return math.sqrt(fraction * (1 - fraction) / (count - 1)) if count > 1 else None

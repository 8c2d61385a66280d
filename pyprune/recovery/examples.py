"""Records as token ids, with the tokens that carry loss: plain text, instructions, conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.importance.sources import NO_TOKENIZER, text_prefix, well_formed

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which Alpaca-cleaned and LLM-Pruner keep.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
        ids: int64 [tokens].
        learned: bool [tokens]: whether the token is to be predicted. The first one never is.
        whole: False for plain text, which may be split where it is too long; instructions are cut at their end.
    """

    ids: np.ndarray
    learned: np.ndarray
    whole: bool


class Encoder:
    """Turns records into examples.

    The kind of a record is told by its fields: ``messages`` (a list of ``{"role", "content"}``), ``instruction`` and
    ``output`` with an optional ``input``, ``prompt`` and ``completion``, or the text field. Prompt and answer are
    tokenised apart, as they are when the model is asked, so the answer's tokens are known exactly.

    Args:
        tokenizer: a Hugging Face tokenizer; None when the records are token ids.
        field: the text field of plain records.
        instruction_format: ``"alpaca"``, or ``"chat"`` for the tokenizer's chat template.
        train_on_prompts: whether prompts carry loss too.
        option: which option the records came from, for errors.
    """

    def __init__(
        self, tokenizer: Any, field: str = "text", instruction_format: str = "alpaca", train_on_prompts: bool = False,
        option: str = "data",
    ) -> None:  # fmt: skip
        self.tokenizer, self.field, self.option = tokenizer, field, option
        self.chat, self.prompts = instruction_format == "chat", train_on_prompts
        self.start = text_prefix(tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        self.end = [] if end is None else [end]

    def __call__(self, record: Any, where: str) -> Example:
        """Raises PyPruneError naming the record's place and its fields when it is of no known kind."""
        if isinstance(record, Tensor):
            return _example([(record.tolist(), True)], whole=False)
        if self.tokenizer is None:
            raise PyPruneError(self.option, where, "is text, and there is no tokenizer", NO_TOKENIZER)
        if isinstance(record, str):
            return self._plain(record)
        if not isinstance(record, Mapping):
            raise self._unknown(where, f"is a {type(record).__name__}", "Records are JSON objects.")
        if record.get("messages") is not None:
            return self._conversation(record["messages"], where)
        if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
            return self._instruction(record, where)
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            return self._asked(record["prompt"], record["completion"])
        if isinstance(record.get(self.field), str):
            return self._plain(record[self.field])
        for name in ("instruction", "output", "prompt", "completion", self.field):
            if name in record and not isinstance(record[name], str):
                problem = f"has a field {name!r} that is no text"
                raise PyPruneError(self.option, where, problem, "Give text, or leave the record out.")
        has = ", ".join(map(str, record)) or "none"
        raise self._unknown(where, "has none of the fields that are known", f"It has: {has}.")

    def _unknown(self, where: str, problem: str, has: str) -> PyPruneError:
        known = f"Known: instruction and output, prompt and completion, messages, {self.field}"
        return PyPruneError(self.option, where, problem, f"{has} {known} (see data_field).")

    def _tokens(self, text: str) -> list[int]:
        text = well_formed(text)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _plain(self, text: str) -> Example:
        return _example([(self.start + self._tokens(text) + self.end, True)], whole=False)

    def _asked(self, prompt: str, answer: str) -> Example:
        asked = self.start + self._tokens(prompt)
        return _example([(asked, self.prompts), (self._tokens(answer) + self.end, True)], whole=True)

    def _instruction(self, record: Mapping[str, Any], where: str) -> Example:
        more = record.get("input") or ""
        if not isinstance(more, str):
            raise PyPruneError(self.option, where, "has an input that is no text", "Leave it out, or give text.")
        if self.chat:
            question = f"{record['instruction']}\n\n{more}" if more else record["instruction"]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
            return self._conversation(turns, where)
        form = WITH_INPUT if more else WITHOUT_INPUT
        return self._asked(form.format(instruction=record["instruction"], input=more), record["output"])

    def _conversation(self, messages: Any, where: str) -> Example:
        proper = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
        if not proper or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
            raise PyPruneError(self.option, where, "has messages that are no list of role and content")
        if getattr(self.tokenizer, "chat_template", None) is None:
            hint = "Use the tokenizer of a chat model, or instruction records with instruction_format alpaca."
            raise PyPruneError(self.option, where, "is a conversation, and the tokenizer has no chat template", hint)
        parts: list[tuple[list[int], bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._rendered(messages[:i], where, True)
            through = self._rendered(messages[: i + 1], where, False)
            if not (prompt.startswith(done) and through.startswith(prompt)):
                problem = "cannot be told apart into question and answer under the tokenizer's chat template"
                raise PyPruneError(self.option, where, problem, "Give it as instruction and output.")
            parts += [(self._tokens(prompt[len(done) :]), self.prompts), (self._tokens(through[len(prompt) :]), True)]
            done = through
        if not parts:
            raise PyPruneError(self.option, where, "has no message of the assistant", "There is nothing to learn.")
        return _example(parts, whole=True)

    def _rendered(self, messages: Sequence[Any], where: str, question: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=question))
        except Exception as error:  # templates are programs that raise what they like
            line = str(error).strip().split("\n")[0]
            raise PyPruneError(self.option, where, f"does not fit the tokenizer's chat template: {line}") from None


def _example(parts: Sequence[tuple[list[int], bool]], whole: bool) -> Example:
    ids = np.array([i for part, _ in parts for i in part], dtype=np.int64)
    learned = np.array([flag for part, flag in parts for _ in part], dtype=bool)
    learned[:1] = False
    return Example(ids, learned, whole)

"""A model that answers: prompt and history in, text out as it comes, with its speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from pyprune import preflight, progress
from pyprune.checkpoint.load import open_model
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import generating_by
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.importance.sources import well_formed

Message = dict[str, str]
"""{"role": "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most in an answer.
        temperature: 0 takes the most likely token; above, tokens are drawn from the softmax of logits / temperature.
        seed: of the draws. It is set anew for every answer, so two models draw with the same numbers.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """An answer so far.

    Attributes:
        model: who gives it.
        text: without special tokens.
        prompt_tokens: tokens that were read: history and prompt.
        tokens: tokens generated, the end mark included.
        first_token: seconds until the first of them was there; None before.
        rate: tokens a second after the first one; None below two tokens.
        ended: "end" (the model's own end mark), "length", "stopped" (by the user); "" while it goes on.
        forgotten: messages of the history that did not fit into the model's positions.
    """

    model: str
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    first_token: float | None = None
    rate: float | None = None
    ended: str = ""
    forgotten: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Speaker:
    """A model with its tokenizer. It keeps no history: that is its caller's.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer, with a chat template or without.
        name: how it is called.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template. Without one the model continues the text."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def stream(self, history: Sequence[Message], prompt: str, sampling: Sampling) -> Generator[Answer, None, None]:
        """The answer as it grows: the same object after every token, complete when the iteration ends.

        Closing the iterator stops the model after the token that it is at.

        Raises:
            PyPruneError: the prompt alone is longer than the positions that the model knows, or the chat template
                refuses it.
        """
        ids, forgotten, room = self._fit(list(history), prompt, sampling.max_new_tokens)
        answer = Answer(self.name, prompt_tokens=ids.shape[1], forgotten=forgotten)
        tokens: list[int] = []
        task = _Generation(self.model, ids, self._settings(room, sampling), sampling.seed)
        try:
            for at, token in task:
                tokens.append(token)
                answer.tokens = len(tokens)
                if answer.first_token is None:
                    answer.first_token, start = at, at
                elif at > start:
                    answer.rate = (len(tokens) - 1) / (at - start)
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                answer.text = text.rstrip("\ufffd")  # the first bytes of a character whose others are to come
                yield answer
        except BaseException:
            answer.ended = "stopped"
            raise
        finally:
            task.stop()
        answer.text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        answer.ended = "end" if tokens and tokens[-1] in self._ends() else "length"

    def _fit(self, history: list[Message], prompt: str, wanted: int) -> tuple[torch.Tensor, int, int]:
        """(ids int64 [1, tokens], messages left out, tokens that may follow): the oldest messages go first."""
        limit = known_positions(self.model)
        forgotten = 0
        while True:
            ids = self._ids(history[forgotten:], prompt)
            if limit is None:
                return ids, forgotten, wanted
            free = limit - ids.shape[1]
            if free >= min(wanted, limit // 2) or (forgotten >= len(history) and free > 0):
                return ids, forgotten, min(wanted, free)
            if forgotten >= len(history):
                problem = f"has {ids.shape[1]} tokens, and the model knows {limit} positions"
                raise PyPruneError("prompt", prompt, problem, "Ask something shorter.")
            forgotten += 2

    def _ids(self, history: Sequence[Message], prompt: str) -> torch.Tensor:
        asked: Message = {"role": "user", "content": prompt}
        messages = [{**m, "content": well_formed(m["content"])} for m in (*history, asked)]
        if self.chats:
            from jinja2 import TemplateError

            try:
                found = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except TemplateError as error:
                raise PyPruneError("prompt", prompt, f"is refused by the chat template: {error}") from None
        else:
            text = "\n".join(m["content"] for m in messages)
            found = self.tokenizer(text, return_tensors="pt")
        ids: torch.Tensor = found["input_ids"]
        if not ids.numel():
            raise PyPruneError("prompt", prompt, "is no token at all", "Write something.")
        return ids

    def _settings(self, room: int, sampling: Sampling) -> GenerationConfig:
        kept = self.model.generation_config
        ends = self._ends()
        pad = self.tokenizer.pad_token_id
        # The checkpoint's own settings are left out but for its end marks: what is compared are the models.
        options: dict[str, Any] = {
            "max_new_tokens": room, "bos_token_id": kept.bos_token_id, "eos_token_id": ends or None,
            "pad_token_id": pad if pad is not None else self.tokenizer.eos_token_id, "do_sample": False,
        }  # fmt: skip
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        return GenerationConfig(**options)

    def _ends(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        ids = [*(own if isinstance(own, (list, tuple)) else [own]), self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None})


def open_speaker(
    name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False,
    option: str = "model_name_or_path",
) -> Speaker:  # fmt: skip
    """Open a model to talk to: stock and pruned folders, per-layer widths included, GGUF files, hub names.

    Args:
        option: where the name came from, for errors.

    Raises:
        PyPruneError: it cannot be opened, or has no tokenizer.
    """
    place = preflight.device(device)
    with progress.bar(f"load {name}"), preflight.renamed(model_name_or_path=option):
        model, tokenizer = open_model(name, dtype, None if place == "cpu" else place, trust_remote_code)
    if tokenizer is None:
        hint = "Copy the tokenizer's files into the folder."
        raise PyPruneError(option, name, "has no tokenizer to read prompts with", hint)
    return Speaker(model, tokenizer, name)


class _Generation(BaseStreamer, StoppingCriteria):
    """``generate`` in a thread of its own: iterating gives (seconds since the start, token) as they come."""

    def __init__(self, model: Any, ids: torch.Tensor, settings: GenerationConfig, seed: int) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._stopped = threading.Event()
        self._prompt_seen = False
        self._work = (model, ids, settings, seed)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __iter__(self) -> Iterator[tuple[float, int]]:
        self._start = time.perf_counter()
        self._thread.start()
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate``: first with the prompt, then with each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        at = time.perf_counter() - self._start
        for token in value.reshape(-1).tolist():
            self._queue.put((at, token))

    def end(self) -> None:
        """Called by ``generate`` after the last token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each sequence is to stop, bool [batch]."""
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), device=input_ids.device)

    def stop(self) -> None:
        """Stop the model, and wait until it has."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        model, ids, settings, seed = self._work
        try:
            torch.manual_seed(seed)
            ids = ids.to(model.device)
            with generating_by(model, settings):
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=self,
                    stopping_criteria=[self],
                )  # fmt: skip
        except BaseException as error:  # it belongs to whoever reads the answer
            self._queue.put(error)
        self._queue.put(None)


@dataclass
class Conversation:
    """Speakers that are asked the same, each with its own history."""

    speakers: Sequence[Speaker]
    sampling: Sampling = field(default_factory=Sampling)
    histories: list[list[Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.histories = [[] for _ in self.speakers]

    def ask(self, prompt: str) -> Generator[list[Answer], None, None]:
        """The answers so far, one speaker after the other so that none slows down another; then all is remembered.

        Where the iteration is left early, the answers that there are by then are remembered, as far as they go.
        """
        answers: list[Answer] = []
        try:
            for speaker, history in zip(self.speakers, self.histories, strict=True):
                stream = speaker.stream(history, prompt, self.sampling)
                for answer in stream:
                    if not answers or answers[-1] is not answer:
                        answers.append(answer)
                    yield answers
        except PyPruneError:
            answers.clear()
            raise
        finally:
            for answer, history in zip(answers, self.histories, strict=False):
                history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.text}]

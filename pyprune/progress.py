"""Progress on stderr, with the time left: bars on a terminal, else a line a minute for a log; silent when told so."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

LINE_SECONDS = 60.0
"""Between two lines where stderr is no terminal. What is done sooner says nothing there."""

_wanted: ContextVar[bool] = ContextVar("pyprune_progress", default=True)
_live: list[Progress] = []  # the one display that is on screen; nested bars become more lines of it


@contextmanager
def shown(on: bool) -> Iterator[None]:
    """Allow progress bars inside the block, or silence them. Within ``shown(False)`` nothing turns them on again."""
    token = _wanted.set(_wanted.get() and on)
    try:
        yield
    finally:
        _wanted.reset(token)


def visible() -> bool:
    """Whether a bar would be drawn now."""
    return _heard() and sys.stderr.isatty()


def _heard() -> bool:
    return _wanted.get() and sys.stderr is not None


class Bar:
    """Work that goes on: :meth:`advance` moves it on, :meth:`say` relabels it. This one tells nobody."""

    def advance(self, steps: int = 1) -> None:
        pass

    def say(self, label: str) -> None:
        pass


class _Drawn(Bar):
    """One line of the display."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display, self._task = display, task

    def advance(self, steps: int = 1) -> None:
        self._display.advance(self._task, steps)

    def say(self, label: str) -> None:
        self._display.update(self._task, description=label)


class _Logged(Bar):
    """Now and then a line of its own."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._began = self._told = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._told < LINE_SECONDS or not _heard():
            return
        self._told = now
        spent = now - self._began
        line = f"{self._label}: {self._done}"
        if self._total is not None:
            left = spent * max(0, self._total - self._done) / max(1, self._done)
            line += f" of {self._total}, {_spelled(left)} left"
        print(f"{line} ({_spelled(spent)} so far)", file=sys.stderr, flush=True)

    def say(self, label: str) -> None:
        self._label = label


def _spelled(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def bar(label: str, total: int | None = None) -> Iterator[Bar]:
    """A bar of ``total`` steps (None: unknown) that is there while the block runs and vanishes after it."""
    if not visible():
        yield _Logged(label, total) if _heard() else Bar()
        return
    outermost = not _live
    if outermost:
        display = _display()
        display.start()
        _live.append(display)
    display = _live[0]
    task = display.add_task(label, total=total)
    try:
        yield _Drawn(display, task)
    finally:
        display.remove_task(task)
        if outermost:
            _live.clear()
            display.stop()


def track(items: Iterable[T], label: str) -> Iterator[T]:
    """Iterate over ``items`` under a bar, of their number where that is known."""
    with bar(label, len(items) if isinstance(items, Sized) else None) as line:
        for item in items:
            yield item
            line.advance()


def _display() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )

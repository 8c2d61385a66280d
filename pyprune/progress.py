"""Progress bars on stderr, with the time left: silent when stderr is not a terminal, or when told so."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

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
    return _wanted.get() and sys.stderr is not None and sys.stderr.isatty()


class Bar:
    """One line of the display. :meth:`advance` moves it on, :meth:`say` relabels it; nothing without a display."""

    def __init__(self, display: Progress | None = None, task: TaskID | None = None) -> None:
        self._display, self._task = display, task

    def advance(self, steps: int = 1) -> None:
        if self._display is not None and self._task is not None:
            self._display.advance(self._task, steps)

    def say(self, label: str) -> None:
        if self._display is not None and self._task is not None:
            self._display.update(self._task, description=label)


@contextmanager
def bar(label: str, total: int | None = None) -> Iterator[Bar]:
    """A bar of ``total`` steps (None: unknown) that is there while the block runs and vanishes after it."""
    if not visible():
        yield Bar()
        return
    outermost = not _live
    if outermost:
        display = _display()
        display.start()
        _live.append(display)
    display = _live[0]
    task = display.add_task(label, total=total)
    try:
        yield Bar(display, task)
    finally:
        display.remove_task(task)
        if outermost:
            _live.clear()
            display.stop()


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a bar; ``total`` is taken from ``len`` where there is one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(label, total) as line:
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

"""A progress bar for work that is not training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)
"""Bars that share a console can be shown at a time, one below the other."""


@contextmanager
def progress_bar(title: str | None, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error, if that is a terminal. Call what it gives to move on.

    Args:
        title: before the bar; None shows none.
        total: what there is to do.
        unit: of ``total``, such as "clips".
    """
    hidden = title is None or not CONSOLE.is_terminal or CONSOLE.is_dumb_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE, transient=True, disable=hidden) as bar:
        task = bar.add_task(title or "", total=total)
        yield lambda done: bar.advance(task, done)

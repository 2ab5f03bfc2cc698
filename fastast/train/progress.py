"""What a person sees while a model trains."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from fastast.train.loop import Meter


class Progress:
    """A progress bar where the output is a terminal, and a line per epoch.

    Epochs of a second would flood the screen: a line follows another after a few seconds at the
    earliest, but for the last one.

    Args:
        title: name of the run.
        quiet: show nothing.
    """

    LINE_SECONDS, BAR_SECONDS = 5.0, 0.5

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title = title
        self.console = Console(file=sys.stderr, quiet=quiet)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal or self.console.is_dumb_terminal,
        )
        self.task = self.bar.add_task(title, total=1.0, rates="")
        self.last_bar = self.last_line = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, done: float, meter: Meter) -> None:
        """Moves the bar to the share of the run that is done.

        It does so a few times a second at most, because reading the loss waits for the device.
        """
        if self.bar.disable or time.perf_counter() - self.last_bar < self.BAR_SECONDS:
            return
        self.last_bar = time.perf_counter()
        now = meter.summary()
        rates = f"loss {now['loss']:.3f}  {_rates(now)}  padding {now['padding']:.1%}"
        if "peak_memory_gib" in now:
            rates += f"  {now['peak_memory_gib']:.1f} GiB"
        self.bar.update(self.task, completed=done, rates=rates)

    def epoch(self, done: float, record: dict) -> None:
        """Prints an epoch's line."""
        if done < 1 and time.perf_counter() - self.last_line < self.LINE_SECONDS:
            return
        self.last_line = time.perf_counter()
        line = (
            f"{self.title}  {done:4.0%}  epoch {record['epoch'] + 1}  "
            f"loss {record['loss']:.4f}  {_rates(record)}"
        )
        if "validation_accuracy" in record:
            line += f"  validation {record['validation_accuracy']:.1%}"
        self.console.print(line, highlight=False, soft_wrap=True)


def _rates(summary: dict) -> str:
    return (
        f"{summary['clips_per_s']:.0f} clips/s  {summary['tokens_per_s'] / 1000:.1f}k tokens/s  "
        f"{summary['audio_hours_per_s'] * 3600:.0f} s of audio/s"
    )

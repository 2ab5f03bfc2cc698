"""What a person sees while a model trains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fastast.train.bar import CONSOLE

if TYPE_CHECKING:
    from fastast.train.meter import Meter


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
        self.console = Console(stderr=True, quiet=True) if quiet else CONSOLE
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
        """Moves the bar to the share of the run that is done, a few times a second at most."""
        if self.bar.disable or time.perf_counter() - self.last_bar < self.BAR_SECONDS:
            return
        self.last_bar = time.perf_counter()
        now = meter.rates()
        rates = (
            f"loss {meter.last_loss:.3f}  {_rates(now)}  padding {now['padding']:.1%}  "
            f"{now['peak_memory_gib']:.1f} GiB"
        )
        self.bar.update(self.task, completed=done, rates=rates)

    def epoch(self, done: float, record: dict) -> None:
        """Prints an epoch's line."""
        if done < 1 and time.perf_counter() - self.last_line < self.LINE_SECONDS:
            return
        self.last_line = time.perf_counter()
        line = (
            f"{done:4.0%}  epoch {record['epoch'] + 1}  loss {record['loss']:.4f}  {_rates(record)}"
        )
        scores = [
            f"{name} {record[f'validation_{name}']:.1%}"
            for name in ("accuracy", "mAP")
            if record.get(f"validation_{name}") is not None
        ]
        if "validation_clips" in record:
            line += f"  validation {', '.join(scores)} ({record['validation_clips']} clips)"
        self.say(line)

    def say(self, line: str) -> None:
        """Prints something about the run."""
        self.console.print(f"{self.title}  {line}", highlight=False, markup=False, soft_wrap=True)


def _rates(summary: dict) -> str:
    return (
        f"{summary['clips_per_s']:.0f} clips/s  {summary['tokens_per_s'] / 1000:.1f}k tokens/s  "
        f"{summary['audio_hours_per_s'] * 3600:.0f} s of audio/s"
    )

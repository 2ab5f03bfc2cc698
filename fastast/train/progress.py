"""What a person sees while a model trains."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar and a line per epoch; only the lines where the output is not a terminal.

    Args:
        title: name of the run.
        epochs: of the run.
        quiet: show nothing.
    """

    def __init__(self, title: str, epochs: int, *, quiet: bool = False) -> None:
        self.epochs = epochs
        self.console = Console(file=sys.stderr, quiet=quiet)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=epochs, rates="")
        self.shown = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, share: float, meter) -> None:
        """Moves the bar, a few times a second: reading the loss waits for the device."""
        if self.bar.disable or time.perf_counter() - self.shown < 0.5:
            return
        self.shown = time.perf_counter()
        now = meter.summary()
        rates = (
            f"loss {now['loss']:.3f}  {now['clips_per_s']:.0f} clips/s  "
            f"{now['tokens_per_s'] / 1000:.1f}k tokens/s  padding {now['padding']:.1%}"
        )
        if "peak_memory_gib" in now:
            rates += f"  {now['peak_memory_gib']:.1f} GiB"
        self.bar.update(self.task, completed=epoch + share, rates=rates)

    def epoch(self, record: dict) -> None:
        """Prints an epoch's line."""
        line = (
            f"epoch {record['epoch'] + 1:3}/{self.epochs}  loss {record['loss']:.4f}  "
            f"{record['clips_per_s']:6.0f} clips/s  {record['tokens_per_s'] / 1000:6.1f}k tokens/s"
        )
        if "validation_accuracy" in record:
            line += f"  validation {record['validation_accuracy']:.1%}"
        self.console.print(line, highlight=False)

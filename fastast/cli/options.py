"""What several commands have in common: their parser, and what they print."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from fastast.cli import COMMANDS
from fastast.data import LeftOut

_MOST_LINES = 10


def parser_of(command: str) -> ArgumentParser:
    """A parser that says what the command does."""
    return ArgumentParser(prog=f"fastast {command}", description=COMMANDS[command])


def add_model(parser: ArgumentParser) -> None:
    """Adds what opens a trained model."""
    parser.add_argument("checkpoint", type=str, help="run directory or model.safetensors")
    parser.add_argument("--device", type=str, default="auto", help="auto takes a GPU if there is")


def numbers(option: str, text: str | None) -> list[float]:
    """Positive numbers separated by commas."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from None
    if any(number <= 0 for number in found):
        raise ValueError(f"{option} takes positive numbers, got {text!r}")
    return found


def whole_numbers(option: str, text: str | None) -> list[int]:
    """Positive whole numbers separated by commas."""
    found = numbers(option, text)
    if any(number % 1 for number in found):
        raise ValueError(f"{option} takes whole numbers, got {text!r}")
    return [int(number) for number in found]


def patch_sizes(option: str, text: str | None) -> list[tuple[int, int]]:
    """Sizes separated by commas, such as ``8,16x32``: mel bins x frames, or one number for both."""
    sizes = []
    for part in text.split(",") if text else []:
        found = re.fullmatch(r"0*([1-9]\d*)(?:x0*([1-9]\d*))?", part.strip())
        if not found:
            raise ValueError(
                f"{option} takes sizes such as 8 or 16x32 (mel bins x frames), separated by "
                f"commas, got {text!r}"
            )
        height, width = found.groups()
        sizes.append((int(height), int(width or height)))
    return sizes


def print_left_out(left_out: Sequence[LeftOut]) -> None:
    """Says on the standard error which clips were left out and why: the first few, and how many."""
    for path, reason in left_out[:_MOST_LINES]:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if len(left_out) > _MOST_LINES:
        print(f"... {len(left_out)} clips were left out in all", file=sys.stderr)

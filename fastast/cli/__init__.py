"""The ``fastast`` command: a module for each of its commands.

A command's module is imported when it is called, and its ``main`` is given the rest of the line.
So ``doctor`` can say what is missing where the others cannot even be imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "fit": "Trains a model from a recipe file; any setting can be overridden.",
    "evaluate": "Measures accuracy, mAP and more; also per class, over lengths and frame shifts.",
    "predict": "Names the most likely classes of audio files, or what is heard when.",
    "embed": "Writes a trained model's embeddings of clips, for use elsewhere.",
    "probe": "Judges a frozen model by a linear classifier and nearest neighbours.",
    "convert": "Makes a run of published weights, or the originals' form of a run.",
    "export": "Writes a model as ONNX or torch.export, which needs nothing of fastast.",
    "features": "Writes and draws the log-mel features of audio files.",
    "reconstruct": "Draws and sounds what a masked autoencoder restores of audio files.",
    "report": "Compares runs: results, settings that differ, learning curves.",
    "tokens": "Says what fixed lengths and packing make of clips: tokens padded, tokens cut.",
    "doctor": "Checks this installation and says what to mend.",
}

EXTRAS = (
    "jsonargparse",
    "matplotlib",
    "rich",
    "safetensors",
    "soundfile",
    "soxr",
    "torchmetrics",
    "yaml",
)
"""Modules that commands need and the library does not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"fastast: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"fastast.cli.{name}").main(rest) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fastast {name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"fastast {name} needs {error.name}: pip install 'fastast[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; --resume goes on with the run" if name == "fit" else ""
        print(f"stopped{hint}", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: fastast COMMAND ...", ""]
    lines += [f"  {name:12}{does}" for name, does in COMMANDS.items()]
    return "\n".join([*lines, "", "'fastast COMMAND --help' tells more."])

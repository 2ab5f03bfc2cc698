"""A run directory: settings, measurements and checkpoints, none of which a crash can damage.

::

    config.yaml         the recipe, complete
    metrics.jsonl       one line per epoch
    checkpoint.pt       weights, optimiser and counters after the last epoch, to resume from
    model.safetensors   the weights with the recipe and class names, to use
    *.png, *.json       figures and evaluations

Files are written under another name and renamed when they are complete and on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastast.methods import Supervised
from fastast.train.recipe import Recipe, build_method

FORMAT = "1"
"""Version of what ``model.safetensors`` holds."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file, then puts it in place of ``path``.

    If writing fails, on a full disk say, what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunDirectory:
    """Reads and writes the files of a run.

    Args:
        path: of the folder; it is made when something is first written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    @property
    def checkpoint_path(self) -> Path:
        """Where the state to resume from lies."""
        return self.path / "checkpoint.pt"

    @property
    def model_path(self) -> Path:
        """Where the weights to use lie."""
        return self.path / "model.safetensors"

    @property
    def metrics_path(self) -> Path:
        """Where the measurements lie."""
        return self.path / "metrics.jsonl"

    def start(self, recipe: Recipe) -> None:
        """Begins a new run: writes its settings and forgets an older run's measurements."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        write_atomically(self.path / "config.yaml", lambda path: path.write_text(text))
        self.metrics_path.unlink(missing_ok=True)

    def log(self, record: dict) -> None:
        """Appends one measurement."""
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self, before_epoch: int | None = None) -> list[dict]:
        """The measurements so far; a line cut short by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        if before_epoch is not None:
            records = [record for record in records if record["epoch"] < before_epoch]
        return records

    def rewind(self, epoch: int) -> None:
        """Forgets measurements from ``epoch`` on, which are about to be made again."""
        lines = "".join(json.dumps(record) + "\n" for record in self.metrics(epoch))
        write_atomically(self.metrics_path, lambda path: path.write_text(lines))

    def save_checkpoint(self, state: dict) -> None:
        """Writes the state to resume from."""
        write_atomically(self.checkpoint_path, lambda path: torch.save(state, path))

    def load_checkpoint(self) -> dict:
        """Reads it back, onto the CPU, without executing anything in it.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{self.checkpoint_path} cannot be read ({error}); remove it to start the run again"
            ) from error

    def save_model(self, model: nn.Module, recipe: Recipe, class_names: list[str]) -> None:
        """Writes the weights, with all that is needed to use them."""
        metadata = {
            "format": FORMAT,
            "recipe": json.dumps(recipe.to_dict()),
            "class_names": json.dumps(class_names),
        }
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        write_atomically(self.model_path, lambda path: save_file(weights, path, metadata))


def load_model(path: str | os.PathLike) -> tuple[Supervised, Recipe, list[str]]:
    """Opens trained weights, for inference.

    Args:
        path: of a ``model.safetensors``, or of the run directory that holds one.

    Returns:
        The method (front end and model) in evaluation mode, its recipe, and the class names.

    Raises:
        ValueError: there is no such file, or it is damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        path = RunDirectory(path).model_path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a run directory or a model.safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this version of fastast: it has format "
            f"{metadata.get('format')!r}, expected {FORMAT!r}"
        )
    recipe = Recipe.from_dict(json.loads(metadata["recipe"]))
    class_names = json.loads(metadata["class_names"])
    method = build_method(recipe, len(class_names))
    method.model.load_state_dict(weights)
    return method.eval(), recipe, class_names

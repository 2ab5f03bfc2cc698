"""A run directory: settings, measurements and checkpoints, none of which a crash can damage.

::

    config.yaml         the recipe, complete
    metrics.jsonl       a line every few steps ("kind": "train"), one per epoch ("epoch") and phase
    tensorboard/        the same, for TensorBoard
    checkpoint.pt       weights, optimiser and counters, to resume from
    model.safetensors   the weights with the recipe and class names, to use
    best/               weights of the best epochs, where their mean is to be kept
    left_out.tsv        files that could not be used, and why
    *.png, *.json       figures and evaluations

Files are written under another name and renamed when they are complete and on disk. The log is
appended to; a checkpoint knows how long it was, and resuming cuts it back to that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastast.train.build import build_method
from fastast.train.recipe import Recipe

FORMAT = "2"
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
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder durable; a rename may otherwise be lost with the power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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

    @property
    def left_out_path(self) -> Path:
        """Where the files that could not be used are listed."""
        return self.path / "left_out.tsv"

    def start(self, recipe: Recipe) -> None:
        """Begins a new run: writes its settings and forgets an older run's measurements."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.sweep()
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        write_atomically(self.path / "config.yaml", lambda path: path.write_text(text))
        self.metrics_path.unlink(missing_ok=True)
        self.left_out_path.unlink(missing_ok=True)
        self.model_path.unlink(missing_ok=True)
        for folder in ("tensorboard", "best"):
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what a killed process had half written."""
        for path in (*self.path.glob(".*.tmp"), *self.path.glob("best/.*.tmp")):
            path.unlink(missing_ok=True)

    def log(self, record: dict) -> None:
        """Appends one measurement."""
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def log_size(self) -> int:
        """Bytes of the log so far, all of them on disk."""
        with open(self.metrics_path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut_log(self, size: int) -> None:
        """Forgets what was logged after it had ``size`` bytes; it is about to be logged again.

        Raises:
            ValueError: the log is shorter than that.
        """
        found = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        if found < size:
            raise ValueError(
                f"{self.metrics_path} has {found} bytes but had {size} when {self.checkpoint_path} "
                "was written: restore it, or start the run again in another folder"
            )
        if found:
            os.truncate(self.metrics_path, size)

    def metrics(self, kind: str | None = None) -> list[dict]:
        """The measurements so far, or those of a kind: ``"train"``, ``"epoch"`` or ``"final"``.

        A line cut short by a crash is left out. Logs of old had epochs alone, and no kinds.
        """
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in records if kind in (None, record.get("kind", "epoch"))]

    def note_left_out(self, left_out: Iterable[tuple[str, str]]) -> int:
        """Lists files that could not be used, and why, each once.

        Returns:
            How many files are on the list.
        """
        path = self.left_out_path
        known = path.read_text().splitlines() if path.exists() else []
        lines = [f"{source}\t{' '.join(reason.split())}" for source, reason in left_out]
        listed = list(dict.fromkeys([*known, *lines]))
        if len(listed) > len(known):
            text = "".join(line + "\n" for line in listed)
            write_atomically(path, lambda path: path.write_text(text))
        return len(listed)

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

    def save_model(
        self,
        weights: dict[str, Tensor],
        recipe: Recipe,
        class_names: list[str],
        *,
        multi_label: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Writes weights, with all that is needed to use them, and ``notes`` for whoever asks."""
        metadata = dict(notes or {}) | {
            "format": FORMAT,
            "recipe": json.dumps(recipe.to_dict()),
            "class_names": json.dumps(class_names),
            "multi_label": json.dumps(multi_label),
        }
        weights = {name: value.contiguous() for name, value in weights.items()}
        write_atomically(self.model_path, lambda path: save_file(weights, path, metadata))

    def save_best(self, weights: dict[str, Tensor], name: str) -> None:
        """Writes the weights after an epoch that is among the best."""
        path = self.path / "best" / name
        path.parent.mkdir(exist_ok=True)
        weights = {name: value.contiguous() for name, value in weights.items()}
        write_atomically(path, lambda path: save_file(weights, path))

    def best_paths(self, names: Iterable[str]) -> list[Path]:
        """Where weights of those names lie."""
        return [self.path / "best" / name for name in names]

    def keep_best(self, names: Iterable[str]) -> None:
        """Removes the weights of epochs that are no longer among the best."""
        names = set(names)
        for path in (self.path / "best").glob("*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def load_model(path: str | os.PathLike) -> tuple[nn.Module, Recipe, list[str]]:
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
    multi_label = json.loads(metadata["multi_label"])
    method = build_method(recipe, len(class_names), multi_label=multi_label)
    method.model.load_state_dict(weights)
    if hasattr(method, "restart_teacher"):  # of which these are the weights
        method.restart_teacher()
    return method.eval(), recipe, class_names

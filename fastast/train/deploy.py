"""A run as one file that needs nothing of this library."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch

from fastast.interop.export import export_single_clip
from fastast.train.run import load_model, write_atomically


def deploy(run: str | PathLike, target: str | PathLike) -> dict[str, str]:
    """Writes a classifier of single clips, for ONNX runtimes or ``torch.export.load``.

    Args:
        run: run directory or ``model.safetensors``.
        target: ``.onnx``, which needs the packages onnx and onnxscript; or ``.pt2``.

    Returns:
        What the file says of itself: ``class_names`` and ``filterbank`` as JSON, the latter with
        all that makes a clip's frames; ``activation``, ``softmax`` or ``sigmoid``, which makes
        probabilities of the logits.

    Raises:
        ValueError: another suffix, packages that are missing, or a model that cannot be exported.
    """
    target = Path(target)
    if target.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"models are exported to .onnx or .pt2, not to {target}")
    method, recipe, class_names = load_model(run)
    front = {key: value for key, value in recipe.to_dict()["frontend"].items() if value is not None}
    front["sample_rate"] = recipe.data.sample_rate
    notes = {
        "class_names": json.dumps(class_names),
        "filterbank": json.dumps(front),
        "activation": "softmax" if method.loss == "cross_entropy" else "sigmoid",
    }
    program = export_single_clip(method.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".pt2":
        write_atomically(target, lambda path: torch.export.save(program, path, extra_files=notes))
    else:
        _write_onnx(program, target, notes)
    return notes


def _write_onnx(program: torch.export.ExportedProgram, target: Path, notes: dict) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401, which torch.onnx needs
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install onnx onnxscript") from error
    converted = torch.onnx.export(
        program, dynamo=True, input_names=["frames"], output_names=["logits"], verbose=False
    ).model_proto
    for name, value in notes.items():
        converted.metadata_props.add(key=name, value=value)
    write_atomically(target, lambda path: onnx.save_model(converted, path))

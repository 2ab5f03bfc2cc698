"""Checkpoints as others publish them: opened without executing anything, and recognised."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
"""Of files that may hold weights."""

_WRAPPINGS = ("state_dict", "model", "model_state", "teacher")
"""Under which the weights lie in checkpoints that hold more: Lightning, DeiT and its descendants,
ElasticAST, ASiT (whose teacher is what to fine-tune)."""

# The first whose keys are all there. Some have the keys of another, and more.
_SIGNATURES = {
    "audio_mae": ("mask_token", "decoder_pos_embed", "decoder_pred.weight"),
    "hts_at": ("tscam_conv.weight", "bn0.weight"),
    "elastic_ast": ("pos_embed_freq", "patch_embed.0.weight"),
    "flexi_ast": ("pos_embed.pos_embed", "patch_embed.proj.weight"),
    "ssast": ("mask_embed", "v.pos_embed"),
    "asit": ("backbone.cls_token", "head_cls.mlp.0.weight", "head_recons.convTrans.weight"),
    "ast": ("v.pos_embed", "mlp_head.1.weight"),
    "transformers": (
        "audio_spectrogram_transformer.embeddings.position_embeddings",
        "classifier.dense.weight",
    ),
    "vit": ("pos_embed", "cls_token", "blocks.0.attn.qkv.weight"),
}


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        weights: by key, without a leading ``module.``.
        path: of the file with the weights.
        config: the ``config.json`` beside them, of a folder as transformers writes it.
        metadata: of a safetensors file.
    """

    weights: dict[str, Tensor]
    path: Path
    config: dict = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | PathLike) -> Checkpoint:
    """Opens weights that somebody has published. Nothing in the file is executed.

    Args:
        path: a ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.safetensors`` file, or a folder as
            transformers writes it (``config.json`` beside ``model.safetensors`` or
            ``pytorch_model.bin``).

    Raises:
        ValueError: no such file, a damaged one, one that would execute code, or one without
            weights.
    """
    path, config = Path(path), {}
    if path.is_dir():
        path, config = _in_folder(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        found, metadata = _read_safetensors(path)
    else:
        found = _read_pickle(path)
    for name in _WRAPPINGS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    weights = {}
    if isinstance(found, Mapping):
        weights = {
            str(key).removeprefix("module."): value
            for key, value in found.items()
            if isinstance(value, Tensor)
        }
    if not weights:
        raise ValueError(
            f"{path} holds no weights by name, neither at its top nor under "
            f"{', '.join(_WRAPPINGS)}: save the model's state_dict()"
        )
    return Checkpoint(weights, path, config, metadata)


def family_of(keys: Collection[str]) -> str:
    """Whose weights have these keys, see :func:`fastast.from_reference`.

    A fine-tuned SSAST has AST's keys and is taken for one.

    Raises:
        ValueError: nobody's that is known; the message says what is missing.
    """
    known = {key.removeprefix("module.").removeprefix("sed_model.") for key in keys}
    for family, signature in _SIGNATURES.items():
        if known.issuperset(signature):
            return family
    lines = []
    for family, signature in _SIGNATURES.items():
        missing = [key for key in signature if key not in known]
        if len(missing) < len(signature):
            lines.append(f"{family} lacks {', '.join(missing)}")
    starts = sorted({key.split(".")[0] for key in known})
    raise ValueError(
        f"the weights are of no known family ({', '.join(_SIGNATURES)}): "
        + (f"{'; '.join(lines)}; " if lines else "")
        + f"the {len(known)} keys begin with {', '.join(starts[:12])}"
    )


def _in_folder(folder: Path) -> tuple[Path, dict]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            config = folder / "config.json"
            return folder / name, json.loads(config.read_text()) if config.is_file() else {}
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_pickle(path: Path):
    try:
        # Audio-MAE's checkpoints hold their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        AttributeError,
        ValueError,
    ) as error:
        if called := re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error)):
            raise ValueError(
                f"{path} would call {called[1]} when it is opened, so it is left closed: ask its "
                "authors for a safetensors file, or save its state_dict() by itself where you "
                "trust it"
            ) from error
        raise ValueError(f"{path} cannot be read, it may be damaged") from error

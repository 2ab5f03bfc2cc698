"""Published checkpoints as runs of ours, and ours as the originals have them.

A converted checkpoint is a ``model.safetensors`` with its recipe, so that ``evaluate``,
``predict``, ``embed`` and ``model.init`` take it as they take any trained model. Its metadata say
where it came from and on what terms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from fastast.interop import from_reference, to_reference
from fastast.interop import transformers as hugging_face
from fastast.interop.checkpoint import Checkpoint, family_of, read_checkpoint
from fastast.models import (
    AST,
    HTSAT,
    SSAST,
    AudioMAE,
    AudioMAEPretraining,
    ElasticAST,
    FlexiAST,
    SSASTPretraining,
)
from fastast.models.vit import TRUNK_SIZES
from fastast.nn import AttentionPool
from fastast.train.build import build_method, seconds_of
from fastast.train.recipe import AudioMAEConfig, FrontendConfig, ModelConfig, Recipe
from fastast.train.run import RunDirectory, load_model, write_atomically


class Terms(NamedTuple):
    """On what terms weights were published; ``free`` if any use of them is allowed."""

    license: str
    free: bool


LICENSES = {
    "ast": Terms("BSD-3-Clause", True),
    "audio_mae": Terms("CC BY-NC 4.0; its README says CC BY 4.0", False),
    "elastic_ast": Terms("none stated", False),
    "flexi_ast": Terms("none stated", False),
    "hts_at": Terms("MIT", True),
    "ssast": Terms("BSD-3-Clause", True),
    "transformers": Terms("that of the model's page; BSD-3-Clause for AST's own", True),
}

# What AST's authors and their successors normalise with, by the number of classes: AudioSet,
# VGGSound, ESC-50 and Speech Commands v2.
_STATISTICS = {
    527: (-4.2677393, 4.5689974),
    309: (-5.0767093, 4.4533687),
    50: (-6.6268077, 5.358466),
    35: (-6.845978, 5.5654526),
}


_PRETRAINING = SSASTPretraining | AudioMAEPretraining


def convert(
    source: str | PathLike,
    folder: str | PathLike,
    *,
    family: str | None = None,
    config: dict | None = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool | None = None,
    mean: float | None = None,
    std: float | None = None,
    accept_license: bool = False,
) -> tuple[Recipe, dict[str, str]]:
    """Makes a run directory of published weights.

    Args:
        source: see :func:`~fastast.interop.checkpoint.read_checkpoint`.
        folder: the run directory; it gets ``model.safetensors`` and ``config.yaml``.
        family: see :func:`~fastast.from_reference`. Default: what the keys say.
        config: what keys cannot say, see there. Default: the ``config.json`` of transformers.
        class_names: in the order of the logits. Default: those of ``config.json``, else numbers.
        multi_label: whether clips have any number of classes. Default: what ``config.json`` says,
            else whether there are AudioSet's 527.
        mean, std: of the log-mel values the model was trained on. Default: what the file
            ``preprocessor_config.json`` says, else those of AudioSet, VGGSound, ESC-50 and Speech
            Commands, by the number of classes. HTS-AT has none.
        accept_license: the terms of weights that not everybody may use for everything are
            accepted.

    Returns:
        The recipe; and where the weights came from, which goes into the metadata of the file:
        ``family``, ``license``, ``source`` and ``source_sha256``.

    Raises:
        ValueError: what cannot be read, recognised or used; terms that were not accepted; or class
            names, mean and deviation that are missing or do not fit.
    """
    checkpoint = read_checkpoint(source)
    try:
        family = family or family_of(checkpoint.weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    if family not in LICENSES:
        raise ValueError(
            f"{checkpoint.path} is of the family {family}, which has no classifier of sound: start "
            "a run from it with model.init"
        )
    terms = LICENSES[family]
    if not (terms.free or accept_license):
        raise ValueError(
            f"the weights of {family} have restrictions (license: {terms.license}): read what "
            "their authors allow, and pass --accept-license"
        )
    config = checkpoint.config | (config or {})
    model = from_reference(checkpoint.weights, family, config)
    classes = 0 if isinstance(model, _PRETRAINING) else model.head.out_features
    names = _class_names(class_names, config, classes)
    if multi_label is None:
        problem = config.get("problem_type")
        multi_label = classes == 527 if problem is None else problem.startswith("multi")
    front = _frontend(model, checkpoint, mean, std)
    recipe, weights = _as_recipe(model, front)
    method = build_method(recipe, classes, multi_label=multi_label)
    method.model.load_state_dict(weights)
    _check_equal(model, method.model.eval(), checkpoint.path)
    notes = {
        "family": family,
        "license": terms.license,
        "source": checkpoint.path.name,
        "source_sha256": _sha256(checkpoint.path),
    }
    run = RunDirectory(folder)
    run.start(recipe)
    run.save_model(weights, recipe, names, multi_label=multi_label, notes=notes)
    return recipe, notes


def export(run: str | PathLike, target: str | PathLike, *, family: str | None = None) -> None:
    """Writes the weights of a run as the original code loads them.

    Args:
        run: run directory or ``model.safetensors``.
        target: a ``.pth`` or ``.safetensors`` file; for ``transformers`` a folder, which gets
            ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``.
        family: see :func:`~fastast.interop.to_reference`.

    Raises:
        ValueError: a model or target that there is no such form for.
    """
    method, recipe, class_names = load_model(run)
    model, target = method.model, Path(target)
    weights = to_reference(model, family)
    if family != "transformers":
        if target.suffix not in (".pth", ".safetensors"):
            raise ValueError(f"weights are written to .pth or .safetensors, not to {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        write = save_file if target.suffix == ".safetensors" else torch.save
        write_atomically(target, lambda path: write(weights, path))
        return
    front = recipe.frontend
    multi_label = method.loss != "cross_entropy"
    files = {
        "config.json": hugging_face.config_of(model, class_names, multi_label=multi_label),
        "preprocessor_config.json": hugging_face.feature_extractor_of(
            recipe.data.sample_rate, front.num_mels, model.input_frames, front.mean, front.std
        ),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(target / name, lambda path, text=text: path.write_text(text))
    write_atomically(
        target / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"})
    )


def _class_names(given: Sequence[str] | None, config: dict, classes: int) -> list[str]:
    if given is None and "id2label" in config:
        labels = {int(number): name for number, name in config["id2label"].items()}
        given = [labels[number] for number in range(len(labels))]
    if given is None:
        return [str(number) for number in range(classes)]
    if len(given) != classes:
        raise ValueError(f"the model has {classes} classes, but {len(given)} names were given")
    return list(given)


def _frontend(
    model: nn.Module, checkpoint: Checkpoint, mean: float | None, std: float | None
) -> FrontendConfig:
    if isinstance(model, HTSAT):  # whose first layer normalises decibels
        if mean is not None or std is not None:
            raise ValueError("HTS-AT normalises by itself: leave mean and std out")
        return FrontendConfig(preset="htsat", mean=0.0, std=0.5)
    beside = checkpoint.path.with_name("preprocessor_config.json")
    known = json.loads(beside.read_text()) if beside.is_file() else {}
    if {"mean", "std"} <= known.keys():
        statistics = known["mean"], known["std"]
    elif isinstance(model, _PRETRAINING):
        statistics = _STATISTICS[527]
    else:
        statistics = _STATISTICS.get(model.head.out_features, (None, None))
        if isinstance(model, ElasticAST):  # whose authors measured them anew for each model
            statistics = None, None
    mean = statistics[0] if mean is None else mean
    std = statistics[1] if std is None else std
    if mean is None or std is None:
        raise ValueError(
            "pass the mean and deviation of the log-mel values that the model was trained on "
            "(--mean, --std): the checkpoint does not hold them"
        )
    return FrontendConfig(num_mels=model.geometry.num_mels, mean=mean, std=std)


def _as_recipe(model: nn.Module, front: FrontendConfig) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A recipe that builds the model, and its weights there."""
    recipe = Recipe(frontend=front)
    if isinstance(model, HTSAT):
        recipe.data.sample_rate = 32000
        recipe.model = _hts_at_config(model)
        return recipe, model.state_dict()
    dim, blocks = model.patch_embed.proj.out_features, model.trunk.blocks
    # All that sets a size apart is written out; its name is the nearest.
    size = min(TRUNK_SIZES, key=lambda name: abs(TRUNK_SIZES[name].dim - dim))
    config = recipe.model = ModelConfig(
        patch_size=model.geometry.patch_size,
        dim=dim,
        depth=len(blocks),
        num_heads=blocks[0].attn.num_heads,
    )
    if isinstance(model, ElasticAST):
        config.name = f"elastic_ast_{size}"
        config.max_time_patches = model.positions.time.shape[0]
        config.pool = "attention" if isinstance(model.pool, AttentionPool) else "mean"
        return recipe, _with_scaled_queries(model)
    if isinstance(model, AudioMAE | AudioMAEPretraining):
        config.name, config.stride = f"audio_mae_{size}", model.geometry.stride
        config.position_wrap = model.positions.wrap
        if isinstance(model, AudioMAEPretraining):
            recipe.train.method, recipe.audio_mae = "audio_mae", _audio_mae_config(model)
        return recipe, model.state_dict()
    recipe.frontend.fixed_seconds = seconds_of(recipe, model.input_frames)
    if isinstance(model, AST | FlexiAST):
        config.distilled = model.geometry.prefix == 2
    if isinstance(model, FlexiAST):
        config.name, config.resize = f"flexi_ast_{size}", model.patch_embed.resize
        return recipe, model.state_dict()
    config.stride = model.geometry.stride
    if isinstance(model, AST):
        config.name = f"ast_{size}"
        return recipe, model.state_dict()
    kind = "frame" if model.geometry.freq_patches == 1 else "patch"
    config.name = f"ssast_{kind}_{size}"
    if isinstance(model, SSAST):
        config.pool = model.pool
    else:
        recipe.train.method = "ssast"
    return recipe, model.state_dict()


def _audio_mae_config(model: AudioMAEPretraining) -> AudioMAEConfig:
    decoder, shift = model.decoder, model.geometry.shift
    blocks = decoder.local_blocks or decoder.global_blocks
    return AudioMAEConfig(
        attention="local" if decoder.local_blocks else "global",
        decoder_dim=decoder.embed.out_features,
        decoder_depth=len(blocks),
        decoder_heads=blocks[0].attn.num_heads,
        shift="both" if shift[0] else "time" if shift[1] else "none",
    )


def _hts_at_config(model: HTSAT) -> ModelConfig:
    geometry, stages = model.geometry, model.layers
    if len(set(geometry.windows)) > 1:
        raise ValueError(f"the windows of its stages differ, {geometry.windows}; a recipe has one")
    return ModelConfig(
        "hts_at_tiny",
        patch_size=geometry.patch_size,
        dim=stages[0].blocks[0].norm1.normalized_shape[0],
        depths=[len(stage.blocks) for stage in stages],
        num_heads=[stage.blocks[0].attn.num_heads for stage in stages],
        image_size=geometry.chunk_frames,
        window=geometry.windows[0],
        fit="stretch" if geometry.stretch_to else "pad",
    )


def _with_scaled_queries(model: ElasticAST) -> dict[str, torch.Tensor]:
    """The weights of the model that scales attention as usual.

    Heads of 64 channels make this a factor of 8, so no digit is lost.
    """
    weights = model.state_dict()
    attention, dim = model.trunk.blocks[0].attn, model.trunk.norm.normalized_shape[0]
    usual = (dim // attention.num_heads) ** -0.5
    factor = (attention.scale or usual) / usual
    for name, value in weights.items():
        if ".attn.qkv." in name:
            weights[name] = torch.cat([factor * value[:dim], value[dim:]])
        elif name.startswith("pool.q."):
            weights[name] = factor * value
    return weights


def _check_equal(original: nn.Module, ours: nn.Module, path: Path) -> None:
    """Compares what both make of noise; no setting of the original may get lost on the way."""
    if isinstance(original, _PRETRAINING):
        return
    frames = getattr(original, "input_frames", 512)
    noise = torch.randn(1, frames, original.geometry.num_mels, generator=torch.Generator())
    noise = noise.to(next(original.parameters()).dtype)
    with torch.inference_mode():
        expected, found = original(noise), ours.to(noise.dtype)(noise)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ValueError(
            f"{path} was converted, but its recipe gives other logits (by up to "
            f"{(found - expected).abs().max():.2g}): it has a setting that recipes lack; use it "
            "through fastast.from_reference"
        )


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()

"""What a masked autoencoder makes of sounds that are partly hidden from it, to see and to hear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import torch
from torch import Tensor, nn

from fastast.data import LeftOut
from fastast.frontend.inversion import invert
from fastast.models import AudioMAEPretraining
from fastast.ops import hop_from_ms
from fastast.segments import Spectrograms
from fastast.tokens import Mask, MaskedGrid, StructuredMask, UnstructuredMask
from fastast.train.build import build_filterbank
from fastast.train.features import Features, extract_features
from fastast.train.recipe import Recipe


@dataclass(frozen=True)
class Reconstruction:
    """Of a file, with one kind of mask. Spectrograms are ``[T, num_mels]``, normalised.

    Attributes:
        masking: name of the kind.
        hidden: bool ``[T, num_mels]``, what was masked.
        masked: the spectrogram with the hidden part at its lowest value.
        restored: with the hidden part as the model restores it.
        error: mean squared error of the hidden part.
    """

    masking: str
    hidden: Tensor
    masked: Tensor
    restored: Tensor
    error: float


def maskings(ratio: float) -> dict[str, Mask]:
    """Masks of every kind that hide this share of a spectrogram (Audio-MAE, figure 2)."""
    both = 1 - math.sqrt(1 - ratio)
    return {
        "unstructured": UnstructuredMask(ratio),
        "time": StructuredMask(time_ratio=ratio),
        "frequency": StructuredMask(freq_ratio=ratio),
        "time+frequency": StructuredMask(both, both),
    }


def reconstruct(
    method: nn.Module,
    recipe: Recipe,
    files: Sequence[str | PathLike],
    ratio: float,
    *,
    max_seconds: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[Features, list[Reconstruction]] | LeftOut]:
    """Hides parts of each file and restores them, with masks of every kind.

    A model that restores normalised patches does not say how loud they are: their own mean and
    deviation are used, which it was not told. One that was trained with ``audio_mae.targets:
    plain`` needs no such help.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`.
        files: of any formats, lengths and sample rates.
        ratio: share to hide, in [0, 1).
        max_seconds: use only the beginning of longer files.
        seed: of the masks.

    Returns:
        For each file, in order, its spectrogram (cut to whole patches) and what was made of it; or
        why there is nothing.

    Raises:
        ValueError: another model, patches that overlap, or a ratio out of range.
    """
    model = method.model
    if not isinstance(model, AudioMAEPretraining):
        raise ValueError(
            f"{type(model).__name__} restores nothing: pass a run of train.method audio_mae"
        )
    if model.geometry.stride != model.geometry.patch_size or model.geometry.time_pool > 1:
        raise ValueError("patches that overlap or are pooled cannot be put together again")
    masks = maskings(ratio)
    for number, found in enumerate(extract_features(files, recipe)):
        if isinstance(found, LeftOut):
            yield found
            continue
        frames, mels = (
            count // size * size
            for count, size in zip(found.frames.shape, model.geometry.patch_size[::-1], strict=True)
        )
        if max_seconds is not None:
            width = model.geometry.patch_size[1]
            most = int(1000 * max_seconds / found.frame_shift_ms) // width * width
            frames = min(frames, max(most, width))
        if not frames:
            yield LeftOut(found.path, "is shorter than a patch")
            continue
        clip = torch.from_numpy(found.frames[:frames])
        made = [
            _restore(model, clip, mels, name, mask, number, seed, method.normalise)
            for name, mask in masks.items()
        ]
        yield replace(found, frames=found.frames[:frames, :mels]), made


@torch.inference_mode()
def _restore(
    model: AudioMAEPretraining,
    clip: Tensor,
    mels: int,
    name: str,
    mask: Mask,
    number: int,
    seed: int,
    normalised: bool,
) -> Reconstruction:
    geometry = replace(model.geometry, mask=mask)
    device = next(model.parameters()).device
    inputs = Spectrograms.from_list([clip.to(device)])
    grid = geometry.grid(inputs.segments).to(device)
    masked = mask(grid, geometry, torch.tensor([number], device=device), seed=seed, epoch=0)
    prediction = model.restore(inputs, masked, grid).float()
    patches = model.patch_embed.cut(inputs.frames, grid.decoded)
    if normalised:
        variance, mean = torch.var_mean(patches, 1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    hidden = grid.split(masked).source < 0
    wanted, found, covered = (
        _image(rows, grid).cpu()
        for rows in (patches, prediction, hidden[:, None].expand_as(patches))
    )
    errors = (found - wanted)[covered].square()
    return Reconstruction(
        name,
        covered,
        torch.where(covered, wanted.min(), wanted),
        torch.where(covered, found, wanted),
        float(errors.mean()) if len(errors) else 0.0,
    )


def _image(rows: Tensor, grid: MaskedGrid) -> Tensor:
    """The patches of a clip, put together: ``[patches, h * w] -> [T, num_mels]``."""
    geometry = grid.decoded.geometry
    patches = rows[geometry.prefix :].unflatten(1, geometry.patch_size)
    image = patches.unflatten(0, (geometry.freq_patches, -1))  # [F, T, h, w]
    return image.permute(1, 3, 0, 2).flatten(2, 3).flatten(0, 1)


def sound_of(frames: Tensor, features: Features, recipe: Recipe) -> Tensor:
    """Int16 samples of a spectrogram ``[T, num_mels]``, see :mod:`fastast.frontend.inversion`.

    Args:
        frames: normalised; mel bins that no patch has are silent.
        features: of the file that it was made from.
        recipe: whose filterbank it is.
    """
    plan = build_filterbank(recipe).plan
    lowest = float(frames.min())
    missing = recipe.frontend.num_mels - frames.shape[1]
    frames = torch.nn.functional.pad(frames, (0, missing), value=lowest)
    shift = hop_from_ms(features.frame_shift_ms, features.sample_rate)
    return (32767 * invert(frames, plan, shift)).round().to(torch.int16)

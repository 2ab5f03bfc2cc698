"""Coarse-to-fine training: a run in phases, each at a time resolution of its own.

Feng, Erol, Chung and Senocak, "From Coarse to Fine: Efficient Training for Audio Spectrogram
Transformers", ICASSP 2024. A phase is an ordinary recipe with its sound compressed in time (section
2.3), and going from one to the next is a checkpoint: the state of the one is saved, its weights are
adapted (section 2.2), and the other is built anew around them. So phases know nothing of devices,
ranks or what is trained, and the training loop hardly anything of phases.

Within a phase the resolution may glide, which the paper does not: each epoch is dealt at a frame
shift of its own, which follows from the number of the epoch, and the model stays the one that is
built for the finest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastast.models.adapt import Change, adapt_state_dict
from fastast.models.hts_at import IMAGE_SIZE
from fastast.tokens import PatchGeometry
from fastast.train.build import build_method, finest_shift
from fastast.train.optim import parameter_groups
from fastast.train.recipe import ModelConfig, PhaseConfig, Recipe


def phases_of(recipe: Recipe) -> list[PhaseConfig]:
    """The phases of a recipe: one that leaves all as it is, if it lists none."""
    return recipe.phases or [PhaseConfig()]


def phase_recipe(recipe: Recipe, number: int, epoch: int | None = None) -> Recipe:
    """The recipe of a phase by itself, without phases.

    Args:
        recipe: the whole.
        number: of the phase, counted from 0.
        epoch: of the phase, counted from 0: at the time resolution of its clips. Default: at the
            finest of all its epochs, which its model is built for.

    Raises:
        ValueError: settings that do not fit together.
    """
    phases = phases_of(recipe)
    phase, train = phases[number], recipe.train
    epochs = phase.epochs or train.epochs
    compression = compression_in(phase, epochs, epochs - 1 if epoch is None else epoch)
    if train.average == "epochs" and train.average_from > epochs and number + 1 < len(phases):
        train = replace(train, average="last")  # it is over before the mean would begin
    train = replace(train, epochs=epochs, max_steps=phase.steps or train.max_steps)
    one = replace(recipe, phases=[], train=train, optim=replace(recipe.optim, **phase.optim))
    return one if compression == 1 else _COMPRESS[phase.by](one, compression)


def compression_in(phase: PhaseConfig, epochs: int, epoch: int) -> float:
    """The factor C in an epoch of a phase.

    Args:
        phase: whose factor may glide.
        epochs: that the phase has.
        epoch: which of them, counted from 0.

    Raises:
        ValueError: a phase that glides has a single epoch.
    """
    if phase.to is None:
        return phase.compression
    if epochs < 2:
        raise ValueError(
            "phases.to changes the frame shift from epoch to epoch, and this phase has one: raise "
            "its epochs, and make epochs smaller with data.clips_per_epoch"
        )
    share = epoch / (epochs - 1)
    return phase.compression ** (1 - share) * phase.to**share


def adapt_state(state: dict, recipe: Recipe, number: int, num_classes: int, **options) -> dict:
    """What a phase takes over from the checkpoint of the one before it.

    Args:
        state: of the phase before: ``model``, ``method`` and ``optimizer`` are read, nothing is
            changed.
        recipe: the whole.
        number: of the phase that is to begin.
        num_classes: of the data.
        **options: of :func:`~fastast.train.build.build_method`.

    Returns:
        ``model``, weights for the new model; ``method``, what its method has learnt beside them;
        and ``moments``, the optimiser's state by the names of the parameters, which is empty unless
        the phase asks for it.

    Raises:
        ValueError: weights that nothing is known about at another time resolution.
    """
    phase = phases_of(recipe)[number]
    recipes = [phase_recipe(recipe, number - 1), phase_recipe(recipe, number)]
    before, after = (_structure(one, num_classes, **options) for one in recipes)
    # From where the one ends to where the other begins.
    scale = _patch_ms(phase_recipe(recipe, number, 0), after) / _patch_ms(recipes[0], before)
    change = Change(scale, phase.resize)
    adapted = {"model": adapt_state_dict(state["model"], before.model, after.model, change)}
    adapted["method"] = adapt_state_dict(state.get("method", {}), before, after, change)
    moments = {}
    if phase.keep_moments:
        names = parameter_names(before, recipes[0])
        found = {names[index]: entry for index, entry in state["optimizer"]["state"].items()}
        moments = _adapt_moments(found, before, after, change)
    return adapted | {"moments": moments}


def parameter_names(method: nn.Module, recipe: Recipe) -> list[str]:
    """The names of a method's parameters, in the order in which its optimiser numbers them."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = parameter_groups(method, recipe.optim)
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def load_moments(
    optimizer: torch.optim.Optimizer, moments: dict[str, dict], names: Sequence[str]
) -> None:
    """Puts running means into a new optimiser.

    Args:
        optimizer: its learning rates and the like stay its own.
        moments: from :func:`adapt_state`.
        names: from :func:`parameter_names`.
    """
    state = optimizer.state_dict()
    state["state"] = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict(state)


def _adapt_moments(
    moments: dict[str, dict], before: nn.Module, after: nn.Module, change: Change
) -> dict[str, dict]:
    """Of each parameter, what its optimiser keeps: tensors of its shape, and how often it
    stepped."""
    # A squared gradient that a pseudo-inverse has made negative has no root.
    by_bilinear = replace(change, kernel="bilinear")
    adapted = {name: dict(entry) for name, entry in moments.items()}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors = {name: entry[key] for name, entry in moments.items()}
        how = change if key == "exp_avg" else by_bilinear
        for name, value in adapt_state_dict(tensors, before, after, how).items():
            adapted[name][key] = value
    return adapted


def _structure(recipe: Recipe, num_classes: int, **options) -> nn.Module:
    """A method without any weights."""
    with torch.device("meta"):
        return build_method(recipe, num_classes, **options)


def _patch_ms(recipe: Recipe, method: nn.Module) -> float:
    """Time from one patch to the next, at the finest resolution of a recipe."""
    return finest_shift(recipe) * method.model.geometry.stride_frames


def _by_frame_shift(recipe: Recipe, factor: float) -> Recipe:
    """The frame shift grows; what is counted in frames shrinks, to cover as much time: masks, and
    HTS-AT's image."""
    front, augment = recipe.frontend, recipe.augment
    time_mask = augment.time_mask
    return replace(
        recipe,
        frontend=replace(front, compression=[factor * rate for rate in front.compression]),
        augment=replace(
            augment,
            time_mask=time_mask if time_mask < 1 else max(round(time_mask / factor), 1),
            roll_frames=round(augment.roll_frames / factor),
        ),
        model=_with_coarse_image(recipe.model, factor),
    )


def _with_coarse_image(model: ModelConfig, factor: float) -> ModelConfig:
    """HTS-AT's image stays square: a factor of 4 halves both of its sides, 256 to 128.

    At other factors only its number of chunks goes down.
    """
    root = math.isqrt(int(factor))
    if not model.name.startswith("hts_at_") or root**2 != factor:
        return model
    return replace(model, image_size=(model.image_size or IMAGE_SIZE) // root)


def _by_pooling(kind: str):
    def compress(recipe: Recipe, factor: float) -> Recipe:
        if max(recipe.model.time_pools) > 1:
            raise ValueError(
                f"phases with by: {kind} pool frames, and model.time_pool does so already: leave "
                "it at 1"
            )
        return replace(
            recipe, model=replace(recipe.model, time_pool=int(factor), time_pooling=kind)
        )

    return compress


def _by_wide_patches(recipe: Recipe, factor: float) -> Recipe:
    """Patches and the steps between them grow along time (p x Cp, section 2.3)."""

    def geometry_of(model: ModelConfig) -> PatchGeometry:
        # What the recipe leaves open is the model's to say.
        front = replace(recipe.frontend, mean=0.0, std=1.0)
        return _structure(replace(recipe, model=model, frontend=front), 1).model.geometry

    given = geometry_of(recipe.model)
    patch, stride = ((size[0], size[1] * int(factor)) for size in (given.patch_size, given.stride))
    model = replace(recipe.model, patch_size=patch)
    if model.stride is not None or geometry_of(model).stride != stride:
        model = replace(model, stride=stride)
    return replace(recipe, model=model)


_COMPRESS = {
    "frame_shift": _by_frame_shift,
    "average": _by_pooling("average"),
    "max": _by_pooling("max"),
    "patch": _by_wide_patches,
}

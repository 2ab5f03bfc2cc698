"""The objects that a recipe asks for: data, model, method, batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from fastast.data import (
    AudioDataset,
    Crop,
    Mixup,
    PackedLoader,
    Packing,
    Planner,
    Sampler,
    mixed_frame_shifts,
    padded_samples,
    samples_in,
)
from fastast.data.datasets import load_manifests
from fastast.frontend import MelFrontend
from fastast.methods import (
    MaskedDistillation,
    MaskedReconstruction,
    MaskedSpectrogramModeling,
    Supervised,
)
from fastast.models import FlexiAST, create_model, create_pretraining_model
from fastast.nn import MelFilterbank
from fastast.ops import Framing, hop_from_ms
from fastast.segments import TokenBudget
from fastast.tokens import (
    GMML,
    ClusteredMask,
    Mask,
    PatchGeometry,
    StructuredMask,
    UnstructuredMask,
)
from fastast.train.recipe import FILTERBANK_SETTINGS, DataConfig, Recipe

PARTS = ("train", "validation", "test")


@dataclass
class Splits:
    """The clips to train on, to validate on while training, and to test on once."""

    train: AudioDataset | None
    validation: AudioDataset | None
    test: AudioDataset | None


def load_data(config: DataConfig, parts: Collection[str] = PARTS) -> Splits:
    """Finds the clips of a recipe and splits them.

    Args:
        config: where they are.
        parts: which of ``train``, ``validation`` and ``test`` are wanted. The files of the others
            are not opened, unless a share of them is wanted.

    Raises:
        ValueError: an unknown format or option, no clips, or parts of different classes.
        AudioError: a file cannot be read, and ``bad_files`` is ``stop``.
    """
    manifests = load_manifests(config.kind, config.root, config.options)
    if "train" not in manifests:
        raise ValueError(f"{config.root} has no training clips, only {', '.join(manifests)}")
    for name, manifest in manifests.items():
        if manifest.class_names != manifests["train"].class_names:
            raise ValueError(
                f"the {name} part of {config.root} has other classes than the train part: "
                f"{sorted(set(manifest.class_names) ^ set(manifests['train'].class_names))}"
            )
    splits: dict[str, AudioDataset | None] = dict.fromkeys(PARTS)
    cut = {name for name in ("validation", "test") if name not in manifests}
    for name, manifest in manifests.items():
        if name in parts or (name == "train" and cut & set(parts)):
            splits[name] = AudioDataset(
                manifest,
                config.sample_rate,
                bad_files=config.bad_files,
                min_seconds=config.min_seconds,
            )
    for name in ("test", "validation"):  # in this order: it decides which clips are whose
        share = getattr(config, name)
        if name in cut and share and splits["train"] is not None:
            whole = splits["train"]
            splits["train"], splits[name] = whole.split(share, config.split_seed)
            splits["train"].left_out = whole.left_out
    return Splits(**splits)


def build_filterbank(recipe: Recipe) -> MelFilterbank:
    """The filterbank of a recipe.

    Raises:
        ValueError: settings that contradict each other or the sample rate.
    """
    front, rate = recipe.frontend, recipe.data.sample_rate
    settings = {name: getattr(front, name) for name in FILTERBANK_SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    if front.preset == "htsat":  # which counts in samples
        settings["window_length"] = hop_from_ms(settings.pop("frame_length_ms"), rate)
    try:
        return MelFilterbank(rate, preset=front.preset, mean=front.mean, std=front.std, **settings)
    except ValueError as error:
        raise ValueError(f"frontend, at data.sample_rate={rate}: {error}") from error


def framing_of(recipe: Recipe) -> Framing:
    """What frame counts depend on in a recipe's filterbank."""
    return build_filterbank(recipe).plan.framing


def build_method(recipe: Recipe, num_classes: int, *, multi_label: bool = False) -> nn.Module:
    """The front end, model and objective of a recipe, with random weights.

    Args:
        recipe: all settings.
        num_classes: of the data; without labels, 0.
        multi_label: whether clips have any number of classes.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """
    if recipe.frontend.mean is None or recipe.frontend.std is None:
        raise ValueError("frontend.mean and frontend.std are not set; measure them first")
    if recipe.train.method == "ssast":
        return _ssast(recipe)
    if recipe.train.method == "audio_mae":
        return _audio_mae(recipe)
    if recipe.train.method == "asit":
        return _asit(recipe)
    return _supervised(recipe, num_classes, multi_label)


def learns_classes(recipe: Recipe) -> bool:
    """Whether the clips' labels are what is learnt."""
    return recipe.train.method == "supervised"


def _supervised(recipe: Recipe, num_classes: int, multi_label: bool) -> Supervised:
    if num_classes < 1:
        raise ValueError("the clips have no labels to learn: choose data with labels")
    loss = recipe.train.loss
    if loss is None:
        loss = "binary_cross_entropy" if multi_label else "cross_entropy"
    elif loss == "cross_entropy" and multi_label:
        raise ValueError(
            "train.loss is cross_entropy, which takes one class per clip, but the clips have "
            "several: use binary_cross_entropy"
        )
    model = _build_model(recipe, partial(create_model, num_classes=num_classes))
    return Supervised(
        model,
        _build_frontend(recipe),
        loss=loss,
        label_smoothing=recipe.train.label_smoothing,
        seed=recipe.train.seed,
    )


def _ssast(recipe: Recipe) -> MaskedSpectrogramModeling:
    _check_unsupervised(recipe)
    config = recipe.ssast
    model = _build_model(recipe, create_pretraining_model)
    if model.geometry.freq_patches == 1:
        mask = UnstructuredMask(config.mask_ratio)
    else:
        mask = ClusteredMask(config.mask_ratio, config.cluster, as_code=config.clusters_as_code)
    return MaskedSpectrogramModeling(
        model,
        _build_frontend(recipe),
        mask,
        generative_weight=config.generative_weight,
        negatives=config.negatives,
        separate_masks=config.separate_masks,
        seed=recipe.train.seed,
    )


def _audio_mae(recipe: Recipe) -> MaskedReconstruction:
    _check_unsupervised(recipe)
    settings = asdict(recipe.audio_mae)
    ratios = [settings.pop(name) for name in ("mask_ratio", "time_ratio", "freq_ratio")]
    if settings.pop("masking") == "unstructured":
        mask = UnstructuredMask(ratios[0])
    else:
        mask = StructuredMask(*ratios[1:])
    targets, average = settings.pop("targets"), settings.pop("average")
    return MaskedReconstruction(
        _build_model(recipe, partial(create_pretraining_model, mask=mask, **settings)),
        _build_frontend(recipe),
        normalise=targets == "normalised",
        average=average,
        seed=recipe.train.seed,
    )


def _check_unsupervised(recipe: Recipe) -> None:
    """Rejects settings of classification where nothing is classified."""
    method, augment = recipe.train.method, recipe.augment
    for name, value in (
        ("train.loss", recipe.train.loss),
        ("train.label_smoothing", recipe.train.label_smoothing),
        ("augment.token_drop", augment.token_drop),
        ("augment.time_drop", augment.time_drop),
        ("augment.freq_drop", augment.freq_drop),
        ("model.init", recipe.model.init),
        ("model.pool", recipe.model.pool),
        ("model.drop_path", recipe.model.drop_path),
    ):
        if value:
            raise ValueError(
                f"{name} ({value}) means nothing to train.method {method}: leave it out"
            )


def _asit(recipe: Recipe) -> MaskedDistillation:
    _check_unsupervised(recipe)
    train, augment = recipe.train, recipe.augment
    for name, value in (
        ("train.average", train.average != "last" and train.average),
        ("augment.mixup", augment.mixup),
        ("frontend.fixed_seconds", recipe.frontend.fixed_seconds),
    ):
        if value:
            raise ValueError(f"{name} ({value}) means nothing to train.method asit: leave it out")
    if augment.crop_seconds is None:
        raise ValueError(
            "train.method asit compares two views of a clip: set augment.crop_seconds, how long "
            "they are"
        )
    settings = asdict(recipe.asit)
    corruption = GMML(**{name: settings.pop(name) for name in CORRUPTION_SETTINGS})
    heads = {name: settings.pop(name) for name in HEAD_SETTINGS}
    heads["as_code"] = settings.pop("heads_as_code")
    return MaskedDistillation(
        _build_model(recipe, partial(create_pretraining_model, **heads)),
        _build_frontend(recipe),
        corruption,
        seed=train.seed,
        **settings,
    )


CORRUPTION_SETTINGS = ("ratio", "alien_share", "alien_ratio", "align")
"""What a recipe can say about ASiT's corruption."""

HEAD_SETTINGS = ("hidden", "bottleneck", "local_classes", "global_classes")
"""What it can say about the sizes of its heads."""


def views_of(recipe: Recipe) -> int:
    """How many parts of each clip a batch has."""
    return 2 if recipe.train.method == "asit" else 1


def _build_model(recipe: Recipe, create: Callable[..., nn.Module]) -> nn.Module:
    front, name = recipe.frontend, recipe.model.name
    settings = {
        key: value
        for key, value in asdict(recipe.model).items()
        if value is not None and key not in ("name", "init")
    }
    if "time_pool" in settings:
        settings["time_pool"] = max(recipe.model.time_pools)
    seconds, input_frames = front.fixed_seconds, recipe.model.input_frames
    if name.startswith("ast_") and seconds is None:
        raise ValueError(f"{name} has a fixed input length: set frontend.fixed_seconds")
    if name.startswith(("ssast_", "asit_")) and seconds is None and input_frames is None:
        seconds = recipe.data.max_seconds
        if views_of(recipe) > 1:
            seconds = max(recipe.augment.crop_seconds)
        if seconds is None:
            raise ValueError(
                f"{name} has positions up to some length: set data.max_seconds, or "
                "frontend.fixed_seconds"
            )
    if name.startswith(("ast_", "flexi_ast_", "ssast_", "asit_")) and seconds is not None:
        if input_frames is not None:
            raise ValueError(
                "model.input_frames follows from frontend.fixed_seconds: set one of them alone"
            )
        settings["input_frames"] = fixed_frames(recipe, seconds, finest_shift(recipe))
    if name.startswith("hts_at_") and front.fixed_seconds is not None:
        raise ValueError(
            f"{name} takes clips of any length: leave frontend.fixed_seconds out, and take parts "
            "of clips with augment.crop_seconds or data.max_seconds"
        )
    try:
        model = create(name, num_mels=front.num_mels, **settings)
    except TypeError as error:  # such as "got an unexpected keyword argument 'stride'"
        raise ValueError(f"model: {name} does not take these settings: {error}") from error
    if recipe.augment.patch_sizes:
        flexible(model)
    return model


def _build_frontend(recipe: Recipe) -> MelFrontend:
    front, augment = recipe.frontend, recipe.augment
    return MelFrontend(
        build_filterbank(recipe),
        dither_in_evaluation=front.dither_in_evaluation,
        roll=augment.roll,
        gain_db=augment.gain_db,
        freq_mask=augment.freq_mask,
        time_mask=augment.time_mask,
        num_freq_masks=augment.num_freq_masks,
        num_time_masks=augment.num_time_masks,
        noise=augment.noise,
        roll_frames=augment.roll_frames,
        fill=0.0 if front.preset == "htsat" else None,
        seed=recipe.train.seed,
    )


def flexible(model: nn.Module) -> FlexiAST:
    """A model whose patches may have any size.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(model, FlexiAST):
        raise ValueError(
            f"patch sizes can be chosen for FlexiAST alone (model.name flexi_ast_*); this is "
            f"{type(model).__name__}"
        )
    return model


def size_pairs(patch_sizes: Sequence[int | Sequence[int]]) -> list[tuple[int, int]]:
    """Patch sizes as mel bins and frames; one number stands for both."""
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in patch_sizes]
    for pair in pairs:
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(
                f"a patch size must be mel bins and frames, or one number for both; got {pair}"
            )
    return pairs


def finest_shift(recipe: Recipe) -> float:
    """The finest frame shift that the recipe trains at, in milliseconds."""
    return mixed_frame_shifts(recipe.frontend.frame_shift_ms, [min(recipe.frontend.compression)])[0]


def fixed_frames(recipe: Recipe, seconds: float, frame_shift_ms: float) -> int:
    """Frames of a clip of so many seconds."""
    rate = recipe.data.sample_rate
    shift = hop_from_ms(frame_shift_ms, rate)
    return int(framing_of(recipe).num_frames(samples_in(seconds, rate), shift))


def seconds_of(recipe: Recipe, frames: int) -> float:
    """How long the shortest clip of so many frames is, at ``frontend.frame_shift_ms``."""
    rate = recipe.data.sample_rate
    shift = hop_from_ms(recipe.frontend.frame_shift_ms, rate)
    return int(framing_of(recipe).least_samples(frames, shift)) / rate


def _token_drop(recipe: Recipe) -> float | Mask:
    augment = recipe.augment
    if not (augment.time_drop or augment.freq_drop):
        return augment.token_drop
    if augment.token_drop:
        raise ValueError(
            "augment.token_drop drops tokens one by one, augment.time_drop and augment.freq_drop "
            "whole times and frequencies: choose one of the two"
        )
    return StructuredMask(augment.time_drop, augment.freq_drop)


def make_loader(
    recipe: Recipe,
    dataset: AudioDataset,
    geometry: PatchGeometry,
    *,
    training: bool = False,
    seconds: float | None = None,
    compression: float | None = None,
    time_pool: int | None = None,
    views: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    fixed_shapes: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> PackedLoader:
    """The batches of a recipe.

    Args:
        recipe: all settings.
        dataset: the clips.
        geometry: of the model's patches.
        training: shuffle, augment, mix resolutions, pooling and patch sizes and drop tokens as the
            recipe says. Otherwise clips come once, at one resolution, whole, in patches of
            ``geometry``.
        seconds: cut clips to this length instead of ``data.max_seconds``; where the recipe fixes
            the input size, fix it to this.
        compression: factor on ``frontend.frame_shift_ms``, if not training. Default: the least
            that the recipe trains at.
        time_pool: frames that are pooled to one, if not training. Default: the least that the
            recipe trains at.
        views: parts of each clip. Default: as many as the method compares; 1 is whole clips, if not
            training.
        rank: of this process, out of ``ranks`` that share the clips.
        ranks: see there.
        fixed_shapes: give all batches the same shapes.
        workers: processes that decode.
        pin_memory: page-lock the batches, for asynchronous copies to a GPU.
    """
    front, augment, train = recipe.frontend, recipe.augment, recipe.train
    rates = front.compression
    if not training:
        rates = [min(rates) if compression is None else compression]
    shifts = mixed_frame_shifts(front.frame_shift_ms, rates)
    dense_frames = None
    if front.fixed_seconds is not None:
        if len(shifts) > 1 or (training and len(recipe.model.time_pools) > 1):
            raise ValueError(
                "frontend.fixed_seconds and several frontend.compression or model.time_pool "
                "exclude each other: a fixed input size has one time resolution"
            )
        dense_frames = fixed_frames(recipe, seconds or front.fixed_seconds, shifts[0])
    framing = framing_of(recipe)
    limit = recipe.data.max_seconds if seconds is None else seconds
    tokens, views = train.batch_tokens, views or views_of(recipe)
    crop = mixup = None
    if augment.crop_seconds is not None and (training or views > 1):
        crop = Crop(tuple(augment.crop_seconds), augment.crop)
    patch_sizes, time_pools = [], []
    sampler = Sampler(shuffle=False)
    if training:
        patch_sizes = size_pairs(augment.patch_sizes or [])
        if len(recipe.model.time_pools) > 1:
            time_pools = recipe.model.time_pools
        if augment.mixup:
            mixup = Mixup(augment.mixup, augment.mixup_alpha, augment.mixup_targets)
        sampler = Sampler(balance=recipe.data.balance, clips=recipe.data.clips_per_epoch)
    else:  # whatever was trained on, any clip can be evaluated
        pools = recipe.model.time_pools
        if time_pool is not None or len(pools) > 1:
            geometry = replace(geometry, time_pool=time_pool or min(pools))
        rate = recipe.data.sample_rate
        samples = int(max(dataset.lengths))
        samples = samples if limit is None else min(samples, samples_in(limit, rate))
        if crop is not None:
            samples = int(crop.longest(np.array(samples), rate))
        hop = hop_from_ms(shifts[0], rate)
        samples = padded_samples(samples, geometry.min_frames(), framing, hop)
        frames = dense_frames or int(framing.num_frames(samples, hop))
        tokens = max(tokens, views * geometry.num_tokens(frames))
    planner = Planner(
        dataset,
        geometry,
        patch_sizes=patch_sizes,
        budget=TokenBudget(tokens, train.batch_clips, tokens),
        framing=framing,
        frame_shift_ms=shifts,
        time_pools=time_pools,
        max_seconds=limit,
        crop=crop,
        dense_frames=dense_frames,
        token_drop=_token_drop(recipe) if training else 0.0,
        mixup=mixup,
        sampler=sampler,
        views=views,
        packing=Packing(
            train.packing, train.packing_window, ranks, train.accumulate if training else 1
        ),
        seed=train.seed,
    )
    return PackedLoader(
        planner,
        rank=rank,
        fixed_shapes=fixed_shapes,
        workers=workers,
        pin_memory=pin_memory,
        bad_files=recipe.data.bad_files,
    )

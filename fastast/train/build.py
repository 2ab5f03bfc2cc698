"""The objects that a recipe asks for: data, model, method, batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

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
)
from fastast.data.datasets import load_manifests
from fastast.frontend import MelFrontend
from fastast.methods import Supervised
from fastast.models import FlexiAST, create_model
from fastast.nn import MelFilterbank
from fastast.ops import Framing, hop_from_ms
from fastast.segments import TokenBudget
from fastast.tokens import PatchGeometry
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


def build_method(recipe: Recipe, num_classes: int, *, multi_label: bool = False) -> Supervised:
    """The front end, model and objective of a recipe, with random weights.

    Args:
        recipe: all settings.
        num_classes: of the data.
        multi_label: whether clips have any number of classes.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """
    front, augment, name = recipe.frontend, recipe.augment, recipe.model.name
    if front.mean is None or front.std is None:
        raise ValueError("frontend.mean and frontend.std are not set; measure them first")
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
    settings = {k: v for k, v in asdict(recipe.model).items() if v is not None and k != "name"}
    if name.startswith("ast_") and front.fixed_seconds is None:
        raise ValueError(f"{name} has a fixed input length: set frontend.fixed_seconds")
    if name.startswith(("ast_", "flexi_ast_")) and front.fixed_seconds is not None:
        if recipe.model.input_frames is not None:
            raise ValueError(
                "model.input_frames follows from frontend.fixed_seconds: set one of them alone"
            )
        settings["input_frames"] = fixed_frames(recipe, front.fixed_seconds, finest_shift(recipe))
    if name.startswith("hts_at_") and front.fixed_seconds is not None:
        raise ValueError(
            f"{name} takes clips of any length: leave frontend.fixed_seconds out, and take parts "
            "of clips with augment.crop_seconds or data.max_seconds"
        )
    try:
        model = create_model(name, num_classes=num_classes, num_mels=front.num_mels, **settings)
    except TypeError as error:  # such as "got an unexpected keyword argument 'stride'"
        raise ValueError(f"model: {name} does not take these settings: {error}") from error
    if augment.patch_sizes:
        flexible(model)
    frontend = MelFrontend(
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
    return Supervised(
        model,
        frontend,
        loss=loss,
        label_smoothing=recipe.train.label_smoothing,
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
    return int(framing_of(recipe).num_frames(int(seconds * rate), shift))


def make_loader(
    recipe: Recipe,
    dataset: AudioDataset,
    geometry: PatchGeometry,
    *,
    training: bool = False,
    seconds: float | None = None,
    compression: float | None = None,
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
        training: shuffle, augment, mix the resolutions and patch sizes and drop tokens as the
            recipe says. Otherwise clips come once, at one resolution, whole, in patches of
            ``geometry``.
        seconds: cut clips to this length instead of ``data.max_seconds``; where the recipe fixes
            the input size, fix it to this.
        compression: factor on ``frontend.frame_shift_ms``, if not training. Default: the least
            that the recipe trains at.
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
        if len(shifts) > 1:
            raise ValueError(
                "frontend.fixed_seconds and several frontend.compression exclude each other: "
                "a fixed input size has one time resolution"
            )
        dense_frames = fixed_frames(recipe, seconds or front.fixed_seconds, shifts[0])
    framing = framing_of(recipe)
    limit = recipe.data.max_seconds if seconds is None else seconds
    tokens = train.batch_tokens
    crop = mixup = None
    patch_sizes = []
    sampler = Sampler(shuffle=False)
    if training:
        patch_sizes = size_pairs(augment.patch_sizes or [])
        if augment.crop_seconds is not None:
            crop = Crop(tuple(augment.crop_seconds), augment.crop)
        if augment.mixup:
            mixup = Mixup(augment.mixup, augment.mixup_alpha, augment.mixup_targets)
        sampler = Sampler(balance=recipe.data.balance, clips=recipe.data.clips_per_epoch)
    else:  # whatever was trained on, any clip can be evaluated
        rate = recipe.data.sample_rate
        samples = int(max(dataset.lengths))
        samples = samples if limit is None else min(samples, int(limit * rate))
        hop = hop_from_ms(shifts[0], rate)
        samples = padded_samples(samples, geometry.min_frames(), framing, hop)
        frames = dense_frames or int(framing.num_frames(samples, hop))
        tokens = max(tokens, geometry.num_tokens(frames))
    planner = Planner(
        dataset,
        geometry,
        patch_sizes=patch_sizes,
        budget=TokenBudget(tokens, train.batch_clips, tokens),
        framing=framing,
        frame_shift_ms=shifts,
        max_seconds=limit,
        crop=crop,
        dense_frames=dense_frames,
        token_drop=augment.token_drop if training else 0.0,
        mixup=mixup,
        sampler=sampler,
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

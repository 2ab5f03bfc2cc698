"""What a run is: the settings that a recipe file holds, and the objects built from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from fastast.data import AudioDataset, PackedLoader, fsdd, mixed_frame_shifts
from fastast.frontend import MelFrontend
from fastast.methods import Supervised
from fastast.models import create_model
from fastast.nn import MelFilterbank
from fastast.ops.mel_filterbank import frame_counts, hop_from_ms
from fastast.segments import TokenBudget
from fastast.tokens import PatchGeometry


@dataclass
class DataConfig:
    """Where the clips come from.

    Args:
        root: folder of the data. With ``train`` and ``test`` folders inside (and maybe
            ``validation``), those are the splits; else a share of the clips is set aside.
        kind: ``folder`` (a folder per class) or ``fsdd`` (the Free Spoken Digit Dataset).
        task: of FSDD: which label to learn.
        leave_out: of FSDD: the speaker to test on, instead of the official split.
        sample_rate: in Hz; clips of other rates are resampled.
        validation: share of the training clips to validate on, in [0, 1).
        test: share of the clips to test on, where the data has no split of its own.
        split_seed: of those shares; it is not the run's seed, so that runs can be compared.
        max_seconds: use only the beginning of longer clips.
    """

    root: str = "data"
    kind: Literal["folder", "fsdd"] = "folder"
    task: Literal["digit", "speaker"] = "digit"
    leave_out: str | None = None
    sample_rate: int = 16000
    validation: float = 0.1
    test: float = 0.1
    split_seed: int = 0
    max_seconds: float | None = 30.0


@dataclass
class FrontendConfig:
    """Log-mel spectrograms and their augmentation.

    Args:
        num_mels: mel bins.
        frame_length_ms: window of a frame.
        frame_shift_ms: the finest time resolution.
        compression: factors C on the frame shift; in training each clip draws one anew in each
            epoch (ElasticAST, section 3.4).
        mean, std: of the log-mel values, for ``(x - mean) / (2 std)``. Default: measured on the
            training clips.
        gain_db: random gain in training, uniform within plus or minus this.
        freq_mask: mel bins of SpecAugment's widest frequency mask.
        time_mask: share of a clip that its widest time mask covers.
        fixed_seconds: cut and pad all clips to this length, for models of fixed input size.
    """

    num_mels: int = 128
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    compression: list[float] = field(default_factory=lambda: [1.0])
    mean: float | None = None
    std: float | None = None
    gain_db: float = 0.0
    freq_mask: int = 0
    time_mask: float = 0.0
    fixed_seconds: float | None = None


@dataclass
class ModelConfig:
    """A registered model; settings left out keep its defaults.

    Args:
        name: one of ``fastast.list_models()``.
        patch_size: mel bins and frames.
        stride: mel bins and frames between patches, for AST.
        dim, depth, num_heads: of the trunk.
        max_time_patches: columns of ElasticAST's time table.
        pool: ElasticAST's pooling, ``attention`` or ``mean``.
    """

    name: str = "elastic_ast_tiny"
    patch_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    max_time_patches: int | None = None
    pool: str | None = None


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        epochs: passes over the training clips.
        max_tokens: stop after this many tokens have been seen, if sooner.
        batch_tokens: tokens of a batch at most.
        batch_clips: clips of a batch at most.
        lr: peak of the learning rate: linear warm-up, then a half cosine to zero.
        warmup: share of the steps to warm up.
        weight_decay: AdamW's, on matrices alone.
        clip_norm: gradients are scaled to at most this norm.
        label_smoothing: of the cross-entropy.
        token_drop: share of tokens dropped in training (ElasticAST's code: 0.1; its paper: 0).
        seed: of weights, order and augmentation.
        device: ``auto`` takes a GPU if there is one.
        bf16: train in bfloat16; default on GPUs.
        compile: compile the training step; default on GPUs.
    """

    epochs: int = 20
    max_tokens: int | None = None
    batch_tokens: int = 4096
    batch_clips: int = 64
    lr: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    token_drop: float = 0.0
    seed: int = 0
    device: str = "auto"
    bf16: bool | None = None
    compile: bool | None = None


@dataclass
class Recipe:
    """All settings of a run. See the classes of its fields."""

    data: DataConfig = field(default_factory=DataConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict:
        """As plain types, for YAML and JSON."""
        plain = asdict(self)
        for name in ("patch_size", "stride"):
            if plain["model"][name] is not None:
                plain["model"][name] = list(plain["model"][name])
        return plain

    @classmethod
    def from_dict(cls, settings: dict) -> Recipe:
        """The inverse of :meth:`to_dict`."""
        return cls(
            DataConfig(**settings["data"]),
            FrontendConfig(**settings["frontend"]),
            ModelConfig(**settings["model"]),
            TrainConfig(**settings["train"]),
        )


@dataclass
class Splits:
    """The clips to train on, to validate on while training, and to test on once."""

    train: AudioDataset
    validation: AudioDataset | None
    test: AudioDataset


def load_data(config: DataConfig) -> Splits:
    """Finds the clips of a recipe and splits them.

    Raises:
        ValueError: the folder is missing, holds no clips, or is half a split.
    """
    root = Path(config.root)
    validation = None
    if config.kind == "fsdd":
        train, test = (
            fsdd(root, config.task, split, config.leave_out, sample_rate=config.sample_rate)
            for split in ("train", "test")
        )
    elif (root / "train").is_dir() or (root / "test").is_dir():
        parts = {
            name: AudioDataset.from_folder(root / name, config.sample_rate)
            for name in ("train", "test", "validation")
            if name != "validation" or (root / name).is_dir()
        }
        train, test, validation = parts["train"], parts["test"], parts.get("validation")
        for name, part in parts.items():
            if part.class_names != train.class_names:
                raise ValueError(
                    f"{root}/train and {root}/{name} have different classes: "
                    f"{sorted(set(train.class_names) ^ set(part.class_names))}"
                )
    else:
        everything = AudioDataset.from_folder(root, config.sample_rate)
        train, test = everything.split(config.test, config.split_seed)
    if validation is None and config.validation:
        train, validation = train.split(config.validation, config.split_seed)
    return Splits(train, validation, test)


def build_filterbank(recipe: Recipe) -> MelFilterbank:
    """The filterbank of a recipe."""
    front = recipe.frontend
    return MelFilterbank(
        recipe.data.sample_rate,
        front.num_mels,
        frame_length_ms=front.frame_length_ms,
        mean=front.mean,
        std=front.std,
    )


def build_method(recipe: Recipe, num_classes: int) -> Supervised:
    """The front end, model and objective of a recipe, with random weights.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """
    front, name = recipe.frontend, recipe.model.name
    if front.mean is None or front.std is None:
        raise ValueError("frontend.mean and frontend.std are not set; measure them first")
    settings = {k: v for k, v in asdict(recipe.model).items() if v is not None and k != "name"}
    if name.startswith("ast_"):
        if front.fixed_seconds is None:
            raise ValueError(f"{name} has a fixed input length: set frontend.fixed_seconds")
        settings["input_frames"] = fixed_frames(recipe, front.fixed_seconds, finest_shift(recipe))
    try:
        model = create_model(name, num_classes=num_classes, num_mels=front.num_mels, **settings)
    except TypeError as error:  # such as "got an unexpected keyword argument 'stride'"
        raise ValueError(f"model: {name} does not take these settings: {error}") from error
    frontend = MelFrontend(
        build_filterbank(recipe),
        gain_db=front.gain_db,
        freq_mask=front.freq_mask,
        time_mask=front.time_mask,
        seed=recipe.train.seed,
    )
    return Supervised(model, frontend, label_smoothing=recipe.train.label_smoothing)


def finest_shift(recipe: Recipe) -> float:
    """The finest frame shift that the recipe trains at, in milliseconds."""
    return mixed_frame_shifts(recipe.frontend.frame_shift_ms, [min(recipe.frontend.compression)])[0]


def fixed_frames(recipe: Recipe, seconds: float, frame_shift_ms: float) -> int:
    """Frames of a clip of so many seconds."""
    rate = recipe.data.sample_rate
    shift = hop_from_ms(frame_shift_ms, rate)
    return int(frame_counts(int(seconds * rate), window_length(recipe), shift))


def window_length(recipe: Recipe) -> int:
    """Samples of a frame."""
    return hop_from_ms(recipe.frontend.frame_length_ms, recipe.data.sample_rate)


def make_loader(
    recipe: Recipe,
    dataset: AudioDataset,
    geometry: PatchGeometry,
    *,
    training: bool = False,
    seconds: float | None = None,
    compression: float | None = None,
    fixed_shapes: bool = False,
    pin_memory: bool = False,
) -> PackedLoader:
    """The batches of a recipe.

    Args:
        recipe: all settings.
        dataset: the clips.
        geometry: of the model's patches.
        training: shuffle, mix the resolutions and drop tokens as the recipe says. Otherwise
            clips come in order, at one resolution, whole.
        seconds: cut clips to this length instead of ``data.max_seconds``; where the recipe fixes
            the input size, fix it to this.
        compression: factor on ``frontend.frame_shift_ms``, if not training. Default: the least
            that the recipe trains at.
        fixed_shapes: give all batches the same shapes.
        pin_memory: page-lock the batches, for asynchronous copies to a GPU.
    """
    front, train = recipe.frontend, recipe.train
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
    limit = recipe.data.max_seconds if seconds is None else seconds
    tokens = train.batch_tokens
    if not training:  # whatever was trained on, any clip can be evaluated
        longest = max(dataset.lengths) / recipe.data.sample_rate
        longest = longest if limit is None else min(longest, limit)
        frames = dense_frames or fixed_frames(recipe, longest, shifts[0])
        tokens = max(tokens, geometry.num_tokens(max(frames, geometry.min_frames())))
    return PackedLoader(
        dataset,
        geometry,
        budget=TokenBudget(tokens, train.batch_clips, tokens),
        window=window_length(recipe),
        frame_shift_ms=shifts,
        max_seconds=limit,
        dense_frames=dense_frames,
        token_drop=train.token_drop if training else 0.0,
        shuffle=training,
        seed=train.seed,
        fixed_shapes=fixed_shapes,
        pin_memory=pin_memory,
    )

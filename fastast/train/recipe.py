"""What a run is: the settings that a recipe file holds.

What is built from them is in :mod:`fastast.train.build`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fastast.train.optim import OptimConfig
from fastast.train.settings import check_choices


@dataclass
class DataConfig:
    """Where the clips come from.

    Args:
        root: folder of the data.
        kind: its format, one of ``fastast.data.datasets.DATASETS``, such as ``folder`` (a folder
            per class), ``csv``, ``ast_json``, ``audioset``, ``esc50``, ``fsdd``.
        options: of that format, such as ``{fold: 1}``; ``docs/data.md`` lists them.
        sample_rate: in Hz; clips of other rates are resampled.
        validation: share of the training clips to validate on, in [0, 1), where the data has no
            validation part of its own.
        test: share of the clips to test on, where the data has no test part of its own.
        split_seed: of those shares; it is not the run's seed, so that runs can be compared.
        max_seconds: use only the beginning of longer clips.
        min_seconds: leave shorter clips out.
        bad_files: what to do about files that are missing, damaged or empty: ``skip`` them and
            say so, or ``stop``.
        balance: draw the training clips with weights that make classes equally likely,
            ``with_replacement`` (AST) or ``without_replacement`` (Audio-MAE).
        clips_per_epoch: training clips of an epoch. Default: all.
    """

    root: str = "data"
    kind: str = "folder"
    options: dict[str, Any] = field(default_factory=dict)
    sample_rate: int = 16000
    validation: float = 0.1
    test: float = 0.1
    split_seed: int = 0
    max_seconds: float | None = 30.0
    min_seconds: float = 0.0
    bad_files: Literal["skip", "stop"] = "skip"
    balance: Literal["none", "with_replacement", "without_replacement"] = "none"
    clips_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, "data")


@dataclass
class FrontendConfig:
    """Log-mel spectrograms.

    Args:
        num_mels: mel bins.
        frame_length_ms: window of a frame.
        frame_shift_ms: the finest time resolution.
        compression: factors C on the frame shift; in training each clip draws one anew in each
            epoch (ElasticAST, section 3.4).
        mean, std: of the log-mel values, for ``(x - mean) / (2 std)``. Default: measured on the
            training clips.
        fixed_seconds: cut and pad all clips to this length, for models of fixed input size.
    """

    num_mels: int = 128
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    compression: list[float] = field(default_factory=lambda: [1.0])
    mean: float | None = None
    std: float | None = None
    fixed_seconds: float | None = None


@dataclass
class AugmentConfig:
    """What happens to training clips alone. All of it is drawn per clip and epoch.

    Args:
        crop_seconds: shortest and longest part of a clip to use; each time one length is drawn,
            and ``data.max_seconds`` means nothing in training.
        crop: where that part lies: at the ``beginning``, at a ``random`` place, or ``cyclic``: from
            a random place and on from the clip's beginning past its end (Audio-MAE).
        gain_db: random gain, uniform within plus or minus this.
        roll: roll the waveform by a random number of samples.
        mixup: share of the clips that are mixed with another (AST on AudioSet: 0.5).
        mixup_alpha: the clip's share is drawn from Beta(alpha, alpha).
        freq_mask: mel bins of SpecAugment's widest frequency mask.
        time_mask: frames of SpecAugment's widest time mask; below 1 the share of the clip that it
            covers.
        noise: most uniform noise added to spectrograms (AST on Speech Commands: 0.1).
        roll_frames: roll the spectrogram by up to this many frames either way.
        token_drop: share of tokens dropped (ElasticAST's code: 0.1; its paper: 0).
    """

    crop_seconds: list[float] | None = None
    crop: Literal["beginning", "random", "cyclic"] = "random"
    gain_db: float = 0.0
    roll: bool = False
    mixup: float = 0.0
    mixup_alpha: float = 10.0
    freq_mask: int = 0
    time_mask: float = 0.0
    noise: float = 0.0
    roll_frames: int = 0
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, "augment")


@dataclass
class ModelConfig:
    """A registered model; settings left out keep its defaults.

    Args:
        name: one of ``fastast.list_models()``.
        patch_size: mel bins and frames.
        stride: mel bins and frames between patches, for AST and SSAST.
        dim, depth, num_heads: of the trunk.
        max_time_patches: columns of ElasticAST's time table.
        pool: ElasticAST's pooling, ``attention`` or ``mean``; SSAST's, ``mean`` or ``cls``.
        init: pre-trained weights to start from: a run directory, a ``model.safetensors``, or a
            ``.pth`` as SSAST's authors publish it. Positions are adapted. For SSAST.
    """

    name: str = "elastic_ast_tiny"
    patch_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    max_time_patches: int | None = None
    pool: str | None = None
    init: str | None = None


@dataclass
class SSASTConfig:
    """SSAST's pre-training, for ``train.method: ssast``. Defaults are the paper's.

    Args:
        mask_ratio: share of a clip's patches that is masked; 400 of 512.
        cluster: smallest and largest side of the squares of patches that are masked together.
            Models of whole frames have them masked one by one.
        generative_weight: weight of the generative loss beside the discriminative one.
        negatives: what a prediction is contrasted with: other ``targets`` (the paper), or for a
            target other ``predictions`` (the code).
        separate_masks: a mask and a forward pass for either loss (the code).
        clusters_as_code: draw the squares as the code does.
    """

    mask_ratio: float = 0.78125
    cluster: tuple[int, int] = (3, 5)
    generative_weight: float = 10.0
    negatives: Literal["targets", "predictions"] = "targets"
    separate_masks: bool = False
    clusters_as_code: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "ssast")


@dataclass
class TrainConfig:
    """The run.

    Args:
        method: what is learnt: the clips' classes (``supervised``), or, without labels, masked
            patches (``ssast``).
        epochs: passes over the training clips.
        max_tokens: stop after this many tokens have been seen, if sooner.
        batch_tokens: tokens of a batch at most, on each rank.
        batch_clips: clips of a batch at most.
        accumulate: batches whose gradients make one step.
        packing: how clips are dealt out to batches: ``first_fit``, ``best_fit_decreasing`` or
            ``next_fit``.
        packing_window: clips that packing looks ahead at.
        loss: ``cross_entropy`` or ``binary_cross_entropy``. Default: the latter where clips have
            several labels.
        label_smoothing: of the cross-entropy.
        average: the weights that are kept in ``model.safetensors``: those after the ``last``
            epoch; their ``ema``, with ``ema_decay``, which is then validated as well; the mean of
            ``epochs`` from ``average_from`` on (AST); or the mean of the ``average_best`` ``best``
            epochs on validation (HTS-AT: 15).
        ema_decay: share of the old average that stays at each step.
        average_from: first epoch of the mean, counted from 1.
        average_best: number of best epochs; 1 is the best one alone.
        metric: what is best on validation. Default: ``accuracy``, or ``mAP`` where clips have
            several labels; ``loss`` where none are learnt. SSAST's ``accuracy`` is that of
            recognising masked patches.
        patience: stop after this many epochs without a better metric. Default: never.
        seed: of weights, order and augmentation.
        device: ``auto`` takes a GPU if there is one.
        bf16: train in bfloat16; default on GPUs.
        compile: compile the training step; default on GPUs.
        workers: processes that decode. Default: on GPUs, the cores there are, at most 8 per GPU;
            else none, a background thread decodes.
        checkpoint_minutes: time between checkpoints within an epoch.
        log_every: steps between lines in the log.
        log_clips: log which clips each step has seen.
    """

    method: Literal["supervised", "ssast"] = "supervised"
    epochs: int = 20
    max_tokens: int | None = None
    batch_tokens: int = 4096
    batch_clips: int = 64
    accumulate: int = 1
    packing: Literal["best_fit_decreasing", "first_fit", "next_fit"] = "first_fit"
    packing_window: int = 1024
    loss: Literal["cross_entropy", "binary_cross_entropy"] | None = None
    label_smoothing: float = 0.0
    average: Literal["last", "ema", "epochs", "best"] = "last"
    ema_decay: float = 0.999
    average_from: int = 1
    average_best: int = 1
    metric: Literal["accuracy", "mAP", "mAUC", "loss"] | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    bf16: bool | None = None
    compile: bool | None = None
    workers: int | None = None
    checkpoint_minutes: float = 10.0
    log_every: int = 10
    log_clips: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "train")
        for name in ("epochs", "batch_tokens", "batch_clips", "accumulate", "packing_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("average_from", "average_best", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.average == "epochs" and self.average_from > self.epochs:
            raise ValueError(
                f"train.average_from ({self.average_from}) comes after the last of "
                f"train.epochs ({self.epochs})"
            )
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"train.patience must be at least 1, got {self.patience}")
        if self.checkpoint_minutes < 0:
            raise ValueError(
                f"train.checkpoint_minutes must not be negative, got {self.checkpoint_minutes}"
            )


@dataclass
class Recipe:
    """All settings of a run. See the classes of its fields."""

    data: DataConfig = field(default_factory=DataConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ssast: SSASTConfig = field(default_factory=SSASTConfig)

    def to_dict(self) -> dict:
        """As plain types, for YAML and JSON."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, settings: dict) -> Recipe:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a section or setting that there is not.
        """
        parts = {}
        for part in fields(cls):
            kind = part.default_factory
            given = dict(settings.get(part.name, {}))
            known = {setting.name for setting in fields(kind)}
            if unknown := sorted(set(given) - known):
                raise ValueError(f"{part.name} has no setting {', '.join(unknown)}")
            parts[part.name] = kind(**given)
        if unknown := sorted(set(settings) - set(parts)):
            raise ValueError(f"a recipe has no section {', '.join(unknown)}")
        return cls(**parts)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

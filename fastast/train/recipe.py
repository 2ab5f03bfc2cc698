"""What a run is: the settings that a recipe file holds.

What is built from them is in :mod:`fastast.train.build`.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fastast.ops import MelPlan
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


FILTERBANK_SETTINGS = (
    "num_mels",
    "frame_length_ms",
    "frame_shift_ms",
    "low_freq",
    "high_freq",
    "window_type",
    "preemphasis",
    "remove_dc_offset",
    "snip_edges",
    "use_power",
    "dither",
)
"""What a recipe can say about a preset."""


def preset_defaults(preset: str) -> dict[str, Any]:
    """The settings of a filterbank's preset, as a recipe names them, and what they are there."""
    parameters = inspect.signature(getattr(MelPlan, preset)).parameters
    known = {name: parameter.default for name, parameter in parameters.items()}
    if "window_length" in known:  # in samples
        known["frame_length_ms"] = 1000 * known.pop("window_length") / known["sample_rate"]
    return known | {"frame_shift_ms": MelPlan.PRESETS[preset]}


@dataclass
class FrontendConfig:
    """Log-mel spectrograms.

    What is left out is as in the preset, and written out in a :class:`Recipe`. A preset has the
    settings that its own front end has; ``docs/filterbank.md`` tells more of them.

    Args:
        preset: ``kaldi`` (AST, SSAST, Audio-MAE, ASiT, ElasticAST), ``htsat`` (HTS-AT; made for
            ``data.sample_rate: 32000``) or ``epic_sounds`` (EPIC-SOUNDS; 24000).
        num_mels: mel bins; of the presets 128, 64 and 128.
        frame_length_ms: window of a frame; 25, 32 and 10.
        frame_shift_ms: the finest time resolution; 10, 10 and 5.
        low_freq: where the lowest mel bin begins, in Hz; 20, 50 and 0.
        high_freq: where the highest ends, in Hz; counted from half the sample rate if it is 0 or
            negative. Default: half the sample rate, but 14000 for ``htsat``.
        window_type: of ``kaldi``: ``hanning`` (the default, as AST), ``povey`` (Kaldi's own),
            ``hamming``, ``rectangular`` or ``blackman``.
        preemphasis: of ``kaldi``, from 0 (none) to 1; 0.97.
        remove_dc_offset: of ``kaldi``: subtract each frame's mean; true.
        snip_edges: of ``kaldi``: only frames that lie inside the clip (true, as AST); else a frame
            for every shift, mirrored at the clip's edges.
        use_power: of ``kaldi``: powers (true), or magnitudes.
        dither: of ``kaldi``: standard deviation of noise that is added to the samples, which lie in
            [-1, 1]: Kaldi's 1.0 is 3.05e-5 here. Drawn anew for each clip and epoch; 0.
        dither_in_evaluation: dither clips in validation, evaluation and prediction too.
        compression: factors C on the frame shift; in training each clip draws one anew in each
            epoch (ElasticAST, section 3.4).
        mean, std: of the log-mel values, for ``(x - mean) / (2 std)``. Default: measured on the
            training clips. Masks and padding have the value 0 before that (AST), or after it with
            ``htsat`` (as HTS-AT has it after its batch normalisation).
        fixed_seconds: cut and pad all clips to this length, for models of fixed input size.
    """

    preset: Literal["kaldi", "htsat", "epic_sounds"] = "kaldi"
    num_mels: int | None = None
    frame_length_ms: float | None = None
    frame_shift_ms: float | None = None
    low_freq: float | None = None
    high_freq: float | None = None
    window_type: Literal["hanning", "povey", "hamming", "rectangular", "blackman"] | None = None
    preemphasis: float | None = None
    remove_dc_offset: bool | None = None
    snip_edges: bool | None = None
    use_power: bool | None = None
    dither: float | None = None
    dither_in_evaluation: bool = False
    compression: list[float] = field(default_factory=lambda: [1.0])
    mean: float | None = None
    std: float | None = None
    fixed_seconds: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "frontend")
        known = preset_defaults(self.preset)
        for name in FILTERBANK_SETTINGS:
            if getattr(self, name) is not None and name not in known:
                having = [preset for preset in MelPlan.PRESETS if name in preset_defaults(preset)]
                raise ValueError(
                    f"frontend.{name} is a setting of the preset {' and '.join(having)}, and "
                    f"frontend.preset is {self.preset}: leave it out, or choose that preset"
                )
        for name in ("frame_length_ms", "frame_shift_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"frontend.{name} must be positive, got {value}")

    def complete(self) -> FrontendConfig:
        """The same with what the preset says about settings that are left out."""
        known = preset_defaults(self.preset)
        missing = [name for name in FILTERBANK_SETTINGS if getattr(self, name) is None]
        return replace(self, **{name: known[name] for name in missing if name in known})


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
        mixup_targets: mix the targets too; without, as in the code of HTS-AT, a clip keeps its own.
        freq_mask: mel bins of SpecAugment's widest frequency mask.
        time_mask: frames of SpecAugment's widest time mask; below 1 the share of the clip that it
            covers.
        num_freq_masks, num_time_masks: how many of each.
        noise: most uniform noise added to spectrograms (AST on Speech Commands: 0.1).
        roll_frames: roll the spectrogram by up to this many frames either way.
        token_drop: share of tokens dropped (ElasticAST's code: 0.1; its paper: 0).
        time_drop, freq_drop: share of a clip's times and of its frequencies whose tokens are all
            dropped (Audio-MAE's fine-tuning: 0.3 each; its code: 0.2).
        patch_sizes: of which every step draws one, for models whose patches may have any size
            (FlexiAST): mel bins and frames, or one number for both. Batches are packed for
            whichever gives the most tokens. Default: the model's own.
    """

    crop_seconds: list[float] | None = None
    crop: Literal["beginning", "random", "cyclic"] = "random"
    gain_db: float = 0.0
    roll: bool = False
    mixup: float = 0.0
    mixup_alpha: float = 10.0
    mixup_targets: bool = True
    freq_mask: int = 0
    time_mask: float = 0.0
    num_freq_masks: int = 1
    num_time_masks: int = 1
    noise: float = 0.0
    roll_frames: int = 0
    token_drop: float = 0.0
    time_drop: float = 0.0
    freq_drop: float = 0.0
    patch_sizes: list[int | tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        check_choices(self, "augment")


@dataclass
class ModelConfig:
    """A registered model; settings left out keep its defaults.

    Args:
        name: one of ``fastast.list_models()``.
        patch_size: mel bins and frames.
        stride: mel bins and frames between patches, for AST and SSAST.
        dim, depth, num_heads: of the trunk; of HTS-AT, ``dim`` is of the first stage, and
            ``num_heads`` a list, of each stage.
        max_time_patches: columns of ElasticAST's time table.
        pool: ElasticAST's pooling, ``attention`` or ``mean``; SSAST's, ``mean`` or ``cls``.
        depths: blocks of each stage of HTS-AT.
        image_size: frames of a row of HTS-AT's image; 128 at a frame shift of 40 ms is its coarse
            one.
        window: patches along the side of HTS-AT's windows.
        drop_path: probability of dropping the last residual branches in training, of HTS-AT and
            Audio-MAE.
        position_wrap: compute Audio-MAE's positions as its published code does; 64 for its
            published weights.
        fit: how HTS-AT's image is filled, ``pad`` (its paper) or ``stretch`` (its code).
        input_frames: frames of the clips that the table of positions of FlexiAST and SSAST is made
            for; it is laid over any others. Where ``frontend.fixed_seconds`` is set, they are that
            long; SSAST's are by default as long as ``data.max_seconds``.
        resize: of FlexiAST's kernel, ``pi`` or ``bilinear``.
        distilled: whether AST and FlexiAST have a distillation token beside the class token.
        time_pool: frames that are pooled into one before patches are cut. Of several numbers, each
            clip draws one in each epoch of training (ElasticAST, section 3.5), and evaluation takes
            the least.
        time_pooling: ``average`` or ``max``.
        init: pre-trained weights to start from: a run directory, a ``model.safetensors``, or a file
            as others publish it: of SSAST, AST, or an ImageNet ViT or DeiT. Positions are adapted;
            FlexiAST's kernel is resized, too, where it starts from a trained AST. Audio-MAE starts
            from Audio-MAE, and HTS-AT from nothing.
    """

    name: str = "elastic_ast_tiny"
    patch_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    dim: int | None = None
    depth: int | None = None
    num_heads: int | list[int] | None = None
    max_time_patches: int | None = None
    pool: str | None = None
    input_frames: int | None = None
    resize: str | None = None
    distilled: bool | None = None
    time_pool: int | list[int] | None = None
    time_pooling: Literal["average", "max"] | None = None
    depths: list[int] | None = None
    image_size: int | None = None
    window: int | None = None
    drop_path: float | None = None
    position_wrap: int | None = None
    fit: Literal["pad", "stretch"] | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "model")
        if not self.time_pools or min(self.time_pools) < 1:
            raise ValueError(
                f"model.time_pool must be a number of frames, or several; got {self.time_pool}"
            )

    @property
    def time_pools(self) -> list[int]:
        """What ``time_pool`` may be for a clip."""
        pools = 1 if self.time_pool is None else self.time_pool
        return [pools] if isinstance(pools, int) else list(pools)


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
        self.cluster = tuple(self.cluster)  # YAML has lists


@dataclass
class AudioMAEConfig:
    """Audio-MAE's pre-training, for ``train.method: audio_mae``. Defaults are the paper's.

    Args:
        masking: ``unstructured`` hides patches one by one, ``structured`` whole times and
            frequencies.
        mask_ratio: share of a clip's patches that is hidden, of ``unstructured`` masking.
        time_ratio, freq_ratio: share of the times and of the frequencies, of ``structured``
            masking; 0 hides none (the code's default: 0.7 and 0.3).
        targets: restore patches ``normalised`` to mean 0 and deviation 1 each, or ``plain``, which
            is what to look at and listen to.
        average: the loss is the mean over ``clips``, or over hidden ``patches``, where longer clips
            count for more.
        attention: of the decoder: ``local`` to windows, ``global``, or ``hybrid``: local blocks and
            then global ones.
        decoder_dim, decoder_depth, decoder_heads: of the decoder. The default of the second is 16,
            8 and 12 by kind of attention.
        decoder_global: the global blocks of a hybrid decoder.
        window: patches along the side of its windows.
        shift: along which axes every second block displaces them by half: ``both`` (the paper),
            ``time`` (the code) or ``none``.
        bias_dropout: of the networks that make the windows' biases (the code: 0.1).
    """

    masking: Literal["unstructured", "structured"] = "unstructured"
    mask_ratio: float = 0.8
    time_ratio: float = 0.0
    freq_ratio: float = 0.0
    targets: Literal["normalised", "plain"] = "normalised"
    average: Literal["clips", "patches"] = "clips"
    attention: Literal["local", "global", "hybrid"] = "local"
    decoder_dim: int = 512
    decoder_depth: int | None = None
    decoder_heads: int = 16
    decoder_global: int = 4
    window: int = 4
    shift: Literal["both", "time", "none"] = "both"
    bias_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, "audio_mae")
        structured = self.time_ratio or self.freq_ratio
        if self.masking == "structured" and not structured:
            raise ValueError(
                "audio_mae.masking is structured: set audio_mae.time_ratio or audio_mae.freq_ratio"
            )
        if self.masking == "unstructured" and structured:
            raise ValueError(
                "audio_mae.time_ratio and audio_mae.freq_ratio are of structured masking: set "
                "audio_mae.masking to structured, or leave them out"
            )


@dataclass
class ASiTConfig:
    """ASiT's pre-training, for ``train.method: asit``. Defaults are the paper's.

    Its two views of a clip are parts of it as ``augment.crop`` says. Each counts as a clip in
    ``train.batch_clips`` and in the log.

    Args:
        ratio: share of a view's pixels that is replaced by zeros, or lowest and highest (the code:
            0.5 and 0.7).
        alien_share: share of the views in which blocks of another clip are pasted instead.
        alien_ratio: share of their pixels that is.
        align: replaced blocks begin and end at multiples of so many mel bins and frames.
        reconstruction_weight: of the loss on pixels (the code: 2).
        local_weight: of the loss between patches.
        global_weight: of the loss between views.
        local_tokens: patches that the local loss counts: ``corrupted`` ones, or ``all`` (the code).
        hidden: width of the hidden layers of heads and decoder.
        bottleneck: width of what follows them.
        local_classes: that patches are assigned to.
        global_classes: that views are assigned to.
        student_temp: temperature of the student.
        teacher_temp: temperature of the teacher.
        first_teacher_temp: the teacher's in the first epoch, if it rises.
        teacher_temp_epochs: epochs in which it rises (the code: 30); 1 is not at all.
        momentum: of the teacher at the beginning.
        momentum_end: at the end, reached along a half cosine.
        center_momentum: of the centres.
        heads_as_code: one head for patches and views but for the last layer, and a narrower
            decoder. The code's attention heads are ``model.num_heads`` of 64 channels each.
    """

    ratio: float | tuple[float, float] = 0.7
    alien_share: float = 0.5
    alien_ratio: float = 0.3
    align: tuple[int, int] = (1, 1)
    reconstruction_weight: float = 1.0
    local_weight: float = 1.0
    global_weight: float = 1.0
    local_tokens: Literal["corrupted", "all"] = "corrupted"
    hidden: int = 2048
    bottleneck: int = 256
    local_classes: int = 1024
    global_classes: int = 8192
    student_temp: float = 0.1
    teacher_temp: float = 0.07
    first_teacher_temp: float = 0.04
    teacher_temp_epochs: int = 1
    momentum: float = 0.996
    momentum_end: float = 1.0
    center_momentum: float = 0.9
    heads_as_code: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "asit")
        self.align = tuple(self.align)  # YAML has lists
        if not isinstance(self.ratio, int | float):
            self.ratio = tuple(self.ratio)


@dataclass
class TrainConfig:
    """The run.

    Args:
        method: what is learnt: the clips' classes (``supervised``), or, without labels, masked
            patches (``ssast``, ``audio_mae``), or what a teacher makes of whole views (``asit``).
        epochs: passes over the training clips.
        max_steps: stop after this many optimiser steps, if sooner.
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

    method: Literal["supervised", "ssast", "audio_mae", "asit"] = "supervised"
    epochs: int = 20
    max_steps: int | None = None
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
        for name in ("max_steps", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, got {value}")
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
class PhaseConfig:
    """A part of a run that sees sound at one time resolution (From Coarse to Fine, section 2).

    Learning rate, schedule, optimiser, averages and early stopping begin anew in each phase, as in
    the paper; all that ``optim`` and ``train`` say holds for each.

    Args:
        compression: factor C on the time from one patch to the next; 1 is the recipe as it stands.
        to: let C fall from ``compression`` to this, by the same ratio from each epoch of the phase
            to the next, which goes beyond the paper. For ``by: frame_shift``, and models that take
            any time resolution. Default: C stays.
        by: how time is compressed: ``frame_shift`` makes the frame shift C times as long,
            ``average`` and ``max`` pool C frames into one, and ``patch`` makes patches C times as
            wide. All but the first need a whole C.
        epochs: passes over the training clips. Default: ``train.epochs``.
        steps: end the phase after this many optimiser steps, if sooner.
        until: end it once the validation ``metric`` is better than this, if sooner; accuracy, mAP
            and mAUC lie in [0, 1].
        resize: how patch kernels get the size that this phase has, ``bilinear`` or ``pi``.
        keep_moments: take the optimiser's running means along, resized as the weights are, which
            goes beyond the paper. The second moments are resized bilinearly, so that they stay
            positive.
        optim: settings of ``optim`` that are others in this phase, such as ``{lr: 1.0e-4}``.
    """

    compression: float = 1.0
    to: float | None = None
    by: Literal["frame_shift", "average", "max", "patch"] = "frame_shift"
    epochs: int | None = None
    steps: int | None = None
    until: float | None = None
    resize: Literal["bilinear", "pi"] = "bilinear"
    keep_moments: bool = False
    optim: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choices(self, "phases")
        if self.compression <= 0:
            raise ValueError(f"phases.compression must be positive, got {self.compression}")
        if self.by != "frame_shift" and (self.compression < 1 or self.compression % 1):
            raise ValueError(
                f"phases.compression must be a whole number with by: {self.by}, got "
                f"{self.compression}"
            )
        if self.to is not None:
            if self.by != "frame_shift":
                raise ValueError(
                    f"phases.to lets the frame shift glide, and phases.by is {self.by}: choose by: "
                    "frame_shift, or leave to out"
                )
            if not 0 < self.to < self.compression:
                raise ValueError(
                    f"phases.to must be positive and less than phases.compression "
                    f"({self.compression}), got {self.to}"
                )
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"phases.{name} must be at least 1, got {value}")
        known = {setting.name for setting in fields(OptimConfig)}
        if unknown := sorted(set(self.optim) - known):
            raise ValueError(f"phases.optim has no setting {', '.join(unknown)}")


@dataclass
class Recipe:
    """All settings of a run. See the classes of its fields.

    ``phases`` are worked off one after the other; without any, a run is one phase
    (:mod:`fastast.train.phases`).
    """

    data: DataConfig = field(default_factory=DataConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ssast: SSASTConfig = field(default_factory=SSASTConfig)
    audio_mae: AudioMAEConfig = field(default_factory=AudioMAEConfig)
    asit: ASiTConfig = field(default_factory=ASiTConfig)
    phases: list[PhaseConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frontend = self.frontend.complete()

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
            if part.name == "phases":
                phases = settings.get("phases", [])
                parts["phases"] = [_make(PhaseConfig, phase, "phases") for phase in phases]
            else:
                parts[part.name] = _make(
                    part.default_factory, settings.get(part.name, {}), part.name
                )
        if unknown := sorted(set(settings) - set(parts)):
            raise ValueError(f"a recipe has no section {', '.join(unknown)}")
        return cls(**parts)


def _make(kind: type, given: dict, section: str) -> Any:
    if unknown := sorted(set(given) - {setting.name for setting in fields(kind)}):
        raise ValueError(f"{section} has no setting {', '.join(unknown)}")
    return kind(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

"""What an optimiser is given: settings, groups of parameters, gradients of bounded norm.

One set of settings expresses the recipes of AST, SSAST, ElasticAST, FlexiAST, Audio-MAE, ASiT and
HTS-AT; ``docs/training.md`` lists them. How the learning rate goes over a run is in
:mod:`fastast.train.schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastast.models.vit import Trunk
from fastast.train.settings import check_choices

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where Adam updates all parameters in one kernel."""


@dataclass
class OptimConfig:
    """Optimiser and schedules.

    Args:
        optimizer: ``adamw``, or ``adam``, whose weight decay is a penalty in the gradient.
        lr: peak of the learning rate.
        betas: decay rates of Adam's two running means.
        weight_decay: at the beginning of the run.
        weight_decay_end: at its end, reached along a half cosine. Default: constant.
        weight_decay_on: what decays: ``matrices`` (all but vectors), ``weights`` (matrices of
            linear and convolution layers, so neither tables of positions nor class and mask
            tokens) or ``all``.
        layer_decay: factor on the learning rate for each layer further from the head; 1 is off.
        head_lr: factor on the learning rate of all that follows the trunk.
        clip_norm: gradients are scaled down to at most this norm; 0 is off.
        clip: the norm of all gradients together (``global``) or of each tensor's (``per_tensor``).
        warmup: how long the learning rate rises linearly; 0 is off.
        warmup_unit: of ``warmup``: ``share`` of the run, ``epochs`` or ``steps``.
        warmup_from: share of the learning rate to begin the warm-up at.
        warmup_every: steps between updates during a warm-up in steps (AST's code: 50).
        schedule: what follows the warm-up: ``cosine`` (half a cosine down to ``min_lr`` at the end
            of the run), ``constant``, ``step`` (times ``gamma`` at epoch ``milestone`` and every
            ``milestone_every`` epochs after), ``table`` (``epoch_factors``) or ``plateau`` (times
            ``gamma`` when the validation metric has not improved for more than ``patience``
            evaluations).
        min_lr: the schedule goes no lower.
        milestone: epochs done when ``step`` first applies.
        milestone_every: epochs from one such step to the next.
        gamma: factor of ``step`` and ``plateau``.
        patience: evaluations without improvement that ``plateau`` puts up with.
        epoch_factors: of ``table``: ``[epoch, factor]``, ascending; once so many epochs are done,
            the learning rate is ``factor * lr``.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    weight_decay_on: Literal["matrices", "weights", "all"] = "matrices"
    layer_decay: float = 1.0
    head_lr: float = 1.0
    clip_norm: float = 1.0
    clip: Literal["global", "per_tensor"] = "global"
    warmup: float = 0.1
    warmup_unit: Literal["share", "epochs", "steps"] = "share"
    warmup_from: float = 0.0
    warmup_every: int = 1
    schedule: Literal["cosine", "constant", "step", "table", "plateau"] = "cosine"
    min_lr: float = 0.0
    milestone: int = 2
    milestone_every: int = 1
    gamma: float = 0.5
    patience: int = 2
    epoch_factors: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choices(self, "optim")
        end = self.weight_decay_end
        epochs = [row[0] for row in self.epoch_factors]
        for fits, name, condition in (
            (0 < self.lr < math.inf, "lr", "positive"),
            (len(self.betas) == 2, "betas", "two numbers"),
            (all(0 <= beta < 1 for beta in self.betas), "betas", "in [0, 1)"),
            (self.weight_decay >= 0, "weight_decay", "at least 0"),
            (end is None or end >= 0, "weight_decay_end", "at least 0"),
            (0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]"),
            (self.head_lr > 0, "head_lr", "positive"),
            (self.clip_norm >= 0, "clip_norm", "at least 0"),
            (self.warmup >= 0, "warmup", "at least 0"),
            (self.warmup_unit != "share" or self.warmup < 1, "warmup", "a share, in [0, 1)"),
            (0 <= self.warmup_from <= 1, "warmup_from", "in [0, 1]"),
            (self.warmup_every >= 1, "warmup_every", "at least 1"),
            (
                self.warmup_every == 1 or self.warmup_unit == "steps",
                "warmup_every",
                "1 unless warmup_unit is 'steps'",
            ),
            (0 <= self.min_lr <= self.lr, "min_lr", f"in [0, lr], lr being {self.lr}"),
            (self.milestone >= 0, "milestone", "at least 0"),
            (self.milestone_every >= 1, "milestone_every", "at least 1"),
            (0 < self.gamma <= 1, "gamma", "in (0, 1]"),
            (self.patience >= 0, "patience", "at least 0"),
            (
                epochs == sorted(set(epochs)) and all(len(row) == 2 for row in self.epoch_factors),
                "epoch_factors",
                "pairs [epoch, factor], epochs ascending",
            ),
            (
                bool(epochs) == (self.schedule == "table"),
                "epoch_factors",
                "given with schedule 'table', and only then",
            ),
        ):
            if not fits:
                self._reject(name, condition)

    def _reject(self, name: str, condition: str) -> None:
        raise ValueError(f"optim.{name} must be {condition}, got {getattr(self, name)!r}")


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over :func:`parameter_groups`, fused where the devices allow it.

    Raises:
        ValueError: ``model`` has nothing to train, or not the structure that the settings need.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ValueError(f"nothing to train: all parameters of {type(model).__name__} are frozen")
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    # With None the optimiser chooses between its other implementations itself.
    return kind(groups, betas=tuple(config.betas), fused=devices <= FUSED_DEVICES or None)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The trainable parameters, each in one group, with all that the optimiser must know of them.

    Args:
        model: the model, or what holds it. Frozen parameters are left out.
        config: the settings.

    Returns:
        A group for each learning rate and kind of weight decay that occurs, in order of the
        first parameter, with ``params``, ``lr``, ``weight_decay``, ``lr_scale`` (the factor on
        the run's learning rate) and ``decays`` (whether the run's weight decay applies).

    Raises:
        ValueError: ``layer_decay`` or ``head_lr`` is set and ``model`` has not exactly one trunk.
    """
    scales = _lr_scales(model, config) if config.layer_decay != 1 or config.head_lr != 1 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = scales.get(name, 1.0), _decays(name, parameter, config)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * scale,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": scale,
            "decays": decays,
        }
        for (scale, decays), parameters in groups.items()
    ]


def layer_ids(model: nn.Module) -> dict[str, int]:
    """How far each parameter is from the input, as layer-wise decay counts it.

    0 is all that the model registers before its trunk (embedding, positions, tokens), ``i + 1``
    is block ``i``, and ``depth + 1`` the trunk's norm and all that follows (Clark et al.,
    "ELECTRA", 2020; in vision transformers as in BEiT and Audio-MAE).

    Raises:
        ValueError: ``model`` has not exactly one :class:`~fastast.models.vit.Trunk`.
    """
    inside, depth = _find_trunk(model)
    ids, last = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{inside}blocks."):
            last = int(name.removeprefix(f"{inside}blocks.").split(".")[0]) + 1
        elif last:  # the blocks have passed
            last = depth + 1
        ids[name] = last
    return ids


def _lr_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    ids, (inside, depth) = layer_ids(model), _find_trunk(model)
    scales = {name: config.layer_decay ** (depth + 1 - layer) for name, layer in ids.items()}
    for name, layer in ids.items():
        if layer == depth + 1 and not name.startswith(inside):
            scales[name] *= config.head_lr
    return scales


def _find_trunk(model: nn.Module) -> tuple[str, int]:
    """What the names of its parameters begin with, and its number of blocks."""
    trunks = [(name, part) for name, part in model.named_modules() if isinstance(part, Trunk)]
    if len(trunks) != 1:
        raise ValueError(
            "optim.layer_decay and optim.head_lr need a model with one trunk, but "
            f"{type(model).__name__} has {len(trunks)}; leave both at 1"
        )
    name, trunk = trunks[0]
    return (f"{name}." if name else ""), len(trunk.blocks)


def _decays(name: str, parameter: nn.Parameter, config: OptimConfig) -> bool:
    if config.weight_decay_on == "all":
        return True
    # Tables and tokens bear names of their own; only layers call their matrix `weight`.
    is_weight = config.weight_decay_on == "matrices" or name.split(".")[-1] == "weight"
    return parameter.ndim >= 2 and is_weight


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Tensor:
    """Scales gradients down to ``config.clip_norm``, in place and without waiting for the device.

    Args:
        parameters: those without a gradient are skipped.
        config: ``clip_norm`` and ``clip`` say what is scaled. Per tensor is what DINO and ASiT
            do.

    Returns:
        The norm of all gradients together before scaling, a scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if config.clip_norm:
        scale = config.clip_norm / ((norms if config.clip == "per_tensor" else total) + 1e-6)
        scale = scale.clamp(max=1)
        torch._foreach_mul_(gradients, list(scale.unbind()) if scale.ndim else scale)
    return total

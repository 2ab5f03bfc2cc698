"""SSAST's published weights (YuanGongND/ssast, BSD-3-Clause)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastast.interop.grid_vit import classifier, encoder, to_classifier, to_encoder, trunk_size
from fastast.models import SSAST, SSASTPretraining

_HEADS = [
    (f"{theirs}.{name}", f"{ours}.{name}")
    for theirs, ours in (("cpredlayer", "discriminate"), ("gpredlayer", "generate"))
    for name in ("0.weight", "0.bias", "2.weight", "2.bias")
]


def from_state_dict(weights: dict[str, Tensor], config: dict) -> SSAST | SSASTPretraining:
    """Converts pre-trained weights (with ``cpredlayer`` and ``gpredlayer``) or fine-tuned ones.

    Pre-trained weights give a :class:`~fastast.models.SSASTPretraining`, whose grid follows from
    ``p_input_fdim`` and ``p_input_tdim``; with ``config["num_classes"]``, a
    :class:`~fastast.models.SSAST` that starts from them with a new classifier. Fine-tuned weights
    give a :class:`~fastast.models.SSAST`. Unused ImageNet heads are left out.

    ``config`` of the latter two: ``stride`` (default 10 both ways, and for patches of all mel bins
    one frame), ``num_mels`` (default as pre-trained, else 128), ``pool`` (``"mean"``, the
    original's ``ft_avgtok``, or ``"cls"``, its ``ft_cls``) and ``input_frames`` (default as
    pre-trained, else the shortest that gives the number of columns of the table).
    """
    height, width = weights["v.patch_embed.proj.weight"].shape[2:]
    pool = config.get("pool", "mean")
    if "mlp_head.1.weight" in weights:
        stride = config.get("stride", _default_stride(height, config.get("num_mels", 128)))
        return classifier(partial(SSAST, pool=pool), weights, stride, config)
    pretrained = _pretrained(weights)
    if "num_classes" not in config:
        return pretrained
    num_mels = config.get("num_mels", pretrained.geometry.num_mels)
    model = SSAST(
        config["num_classes"],
        input_frames=config.get("input_frames", pretrained.input_frames),
        num_mels=num_mels,
        patch_size=(height, width),
        stride=config.get("stride", _default_stride(height, num_mels)),
        pool=pool,
        **trunk_size(weights),
    ).to(weights["mask_embed"].dtype)
    model.start_from(pretrained)
    return model


def to_state_dict(model: SSAST | SSASTPretraining) -> dict[str, Tensor]:
    """The inverse; the unused ImageNet heads are not there."""
    if isinstance(model, SSAST):
        return to_classifier(model)
    weights = model.state_dict()
    return (
        to_encoder(model)
        | {theirs: weights[ours] for theirs, ours in _HEADS}
        | {
            "mask_embed": weights["mask_token"][None, None],
            "p_input_fdim": torch.tensor(model.geometry.num_mels),
            "p_input_tdim": torch.tensor(model.input_frames),
        }
    )


def _pretrained(weights: dict[str, Tensor]) -> SSASTPretraining:
    kernel = weights["v.patch_embed.proj.weight"]  # [dim, 1, height, width]
    model = SSASTPretraining(
        input_frames=int(weights["p_input_tdim"]),
        num_mels=int(weights["p_input_fdim"]),
        patch_size=tuple(kernel.shape[2:]),
        **trunk_size(weights),
    ).to(kernel.dtype)
    converted = encoder(weights) | {"mask_token": weights["mask_embed"][0, 0]}
    for theirs, ours in _HEADS:
        converted[ours] = weights[theirs]
    model.load_state_dict(converted)
    return model


def _default_stride(height: int, num_mels: int) -> tuple[int, int]:
    return (height, 1) if height == num_mels else (10, 10)

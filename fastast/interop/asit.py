"""ASiT's published layout of weights (Sara-Ahmed/ASiT).

Its spectrograms are time by frequency, and so are its kernels, and its tokens are listed time by
time; here it is the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models import ASiT, ASiTPretraining


def from_state_dict(weights: dict[str, Tensor], config: dict) -> ASiT | ASiTPretraining:
    """Converts the weights of a student or a teacher: ``backbone.*``, ``head_cls.*`` and
    ``head_recons.*``.

    The teacher is what the paper fine-tunes (section 4.2). With ``config["num_classes"]``, an
    :class:`~fastast.models.ASiT` starts from the backbone with a new classifier; else this is an
    :class:`~fastast.models.ASiTPretraining`.

    ``config``: ``num_mels`` (default 128) and ``num_heads`` (default 64 channels each, as in the
    published code; the paper's are of 128). Of an ASiT also ``stride`` (default 10 both ways) and
    ``input_frames`` (default as pre-trained).
    """
    kernel = weights["backbone.patch_embed.proj.weight"]  # [dim, 1, time, frequency]
    dim, _, width, height = kernel.shape
    num_mels = config.get("num_mels", 128)
    time_patches, rest = divmod(weights["backbone.pos_embed"].shape[1] - 1, num_mels // height)
    if rest:
        raise ValueError(
            f"backbone.pos_embed does not fill {num_mels // height} rows of frequency: "
            f"config['num_mels'] {num_mels} is not the model's"
        )
    settings = {
        "num_mels": num_mels,
        "patch_size": (height, width),
        "dim": dim,
        "depth": count_blocks(weights, "backbone.blocks."),
        "num_heads": config.get("num_heads", dim // 64),
    }
    pretrained = _pretrained(weights, settings | {"input_frames": time_patches * width})
    if "num_classes" not in config:
        return pretrained
    settings["input_frames"] = config.get("input_frames", pretrained.input_frames)
    if "stride" in config:
        settings["stride"] = config["stride"]
    model = ASiT(config["num_classes"], **settings).to(kernel.dtype)
    model.start_from(pretrained)
    return model


def to_state_dict(model: ASiTPretraining) -> dict[str, Tensor]:
    """The inverse, for models with the heads of the published code.

    Raises:
        ValueError: a model with the heads of the paper, which that code does not have.
    """
    if len(model.bottlenecks) == 2:
        raise ValueError(
            "ASiT's code has no place for two separate heads, which are the paper's: only models "
            "made with as_code=True have its layout"
        )
    own, size = model.state_dict(), model.geometry.patch_size
    weights = {theirs: own[ours] for theirs, ours in _names(len(model.trunk.blocks))}
    table, grid = own["positions.table"], model.positions.grid
    patches = table[1:].unflatten(0, grid).transpose(0, 1).flatten(0, 1)
    weights |= {
        "backbone.cls_token": own["prefix"][None],
        "backbone.pos_embed": torch.cat([table[:1], patches])[None],
        "backbone.patch_embed.proj.weight": _by_time(own["patch_embed.proj.weight"], size),
        "head_recons.convTrans.weight": _by_time(own["decoder.6.weight"].T, size),
    }
    for layer, ours in _CLASSES:
        weights[f"head_cls.{layer}.weight_g"] = torch.ones_like(own[ours][:, :1])
    return weights


_CLASSES = (("cls_layer", "global_classes.weight"), ("data_layer", "local_classes.weight"))


def _names(depth: int) -> list[tuple[str, str]]:
    """Their name and ours, of the tensors that are the same."""
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = [
        (f"backbone.blocks.{block}.{part}", f"trunk.blocks.{block}.{part}")
        for block in range(depth)
        for part in parts
    ]
    layers += [("backbone.norm", "trunk.norm")]
    for layer in (0, 2, 4):
        layers.append((f"head_cls.mlp.{layer}", f"bottlenecks.0.{layer}"))
        layers.append((f"head_recons.mlp.{layer}", f"decoder.{layer}"))
    return [
        *((f"{theirs}.{x}", f"{ours}.{x}") for theirs, ours in layers for x in ("weight", "bias")),
        ("backbone.patch_embed.proj.bias", "patch_embed.proj.bias"),
        ("head_recons.convTrans.bias", "decoder.6.bias"),
        *((f"head_cls.{layer}.weight_v", ours) for layer, ours in _CLASSES),
    ]


def _pretrained(weights: dict[str, Tensor], settings: dict) -> ASiTPretraining:
    weights = weights | _classes(weights)
    hidden, bottleneck = (len(weights[f"head_cls.mlp.{layer}.bias"]) for layer in (0, 4))
    model = ASiTPretraining(
        hidden=hidden,
        bottleneck=bottleneck,
        global_classes=len(weights["head_cls.cls_layer.weight_v"]),
        local_classes=len(weights["head_cls.data_layer.weight_v"]),
        as_code=True,
        **settings,
    ).to(weights["backbone.cls_token"].dtype)
    converted = {ours: weights[theirs] for theirs, ours in _names(settings["depth"])}
    table = weights["backbone.pos_embed"][0]
    patches = table[1:].unflatten(0, model.positions.grid[::-1]).transpose(0, 1).flatten(0, 1)
    converted |= {
        "prefix": weights["backbone.cls_token"][0],
        "positions.table": torch.cat([table[:1], patches]),
        "patch_embed.proj.weight": _by_frequency(weights["backbone.patch_embed.proj.weight"]),
        "decoder.6.weight": _by_frequency(weights["head_recons.convTrans.weight"]).T,
    }
    model.load_state_dict(converted)
    return model


def _classes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of the weight-normalised layers, whose lengths the code keeps at 1.

    PyTorch names lengths and directions in two ways, by its version.
    """
    found = {}
    for layer, _ in _CLASSES:
        prefix, names = f"head_cls.{layer}", ("weight_g", "weight_v")
        if f"{prefix}.weight_v" not in weights:
            names = [f"parametrizations.weight.original{index}" for index in (0, 1)]
        length, direction = (weights[f"{prefix}.{name}"] for name in names)
        if not (length == 1).all():
            raise ValueError(
                f"{prefix} has rows of other lengths than 1, which are not those of ASiT's "
                "classes: pass weights as its code saves them"
            )
        found[f"{prefix}.weight_v"] = direction
    return found


def _by_frequency(kernel: Tensor) -> Tensor:
    """``[n, 1, time, frequency]`` as rows of pixels, frequency by time: ``[n, pixels]``."""
    return kernel[:, 0].transpose(1, 2).flatten(1)


def _by_time(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse, of patches of a size."""
    return rows.unflatten(1, (1, *size)).transpose(2, 3)

"""ASiT's published layout of weights (Sara-Ahmed/ASiT).

Its spectrograms are time by frequency, and so are its kernels, and its tokens are listed time by
time; here it is the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models import ASiT, ASiTPretraining


def from_state_dict(weights: dict[str, Tensor], config: dict) -> ASiT | ASiTPretraining:
    """Converts the weights of a student or a teacher: ``backbone.*``, ``head_cls.*`` and
    ``head_recons.*``.

    A whole checkpoint gives its teacher, which the paper fine-tunes (section 4.2). With
    ``config["num_classes"]``, an :class:`~fastast.models.ASiT` starts from the backbone with a new
    classifier; else this is an :class:`~fastast.models.ASiTPretraining`.

    ``config``: ``num_mels`` (default 128) and ``num_heads`` (default 64 channels each, as in the
    published code; the paper's are of 128). Of an ASiT also ``stride`` (default 10 both ways) and
    ``input_frames`` (default as pre-trained).
    """
    if isinstance(weights.get("teacher"), Mapping):
        weights = {key.removeprefix("module."): x for key, x in weights["teacher"].items()}
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


def _pretrained(weights: dict[str, Tensor], settings: dict) -> ASiTPretraining:
    hidden, bottleneck = (weights[f"head_cls.mlp.{layer}.weight"].shape[0] for layer in (0, 4))
    classes = {name: _directions(weights, name) for name in ("cls_layer", "data_layer")}
    model = ASiTPretraining(
        hidden=hidden,
        bottleneck=bottleneck,
        global_classes=len(classes["cls_layer"]),
        local_classes=len(classes["data_layer"]),
        as_code=True,
        **settings,
    ).to(weights["backbone.cls_token"].dtype)
    convolution = weights["head_recons.convTrans.weight"]  # [128, 1, time, frequency]
    converted = _encoder(weights, model.positions.grid) | {
        "global_classes.weight": classes["cls_layer"],
        "local_classes.weight": classes["data_layer"],
        "decoder.6.weight": _by_frequency(convolution).T,
        "decoder.6.bias": weights["head_recons.convTrans.bias"],
    }
    for layer in (0, 2, 4):
        for part in ("weight", "bias"):
            converted[f"bottlenecks.0.{layer}.{part}"] = weights[f"head_cls.mlp.{layer}.{part}"]
            converted[f"decoder.{layer}.{part}"] = weights[f"head_recons.mlp.{layer}.{part}"]
    model.load_state_dict(converted)
    return model


def _encoder(weights: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Patch embedding, class token, positions and trunk under our names."""
    table = weights["backbone.pos_embed"][0]
    patches = table[1:].unflatten(0, grid[::-1]).transpose(0, 1).flatten(0, 1)
    converted = {
        "patch_embed.proj.weight": _by_frequency(weights["backbone.patch_embed.proj.weight"]),
        "patch_embed.proj.bias": weights["backbone.patch_embed.proj.bias"],
        "prefix": weights["backbone.cls_token"][0],
        "positions.table": torch.cat([table[:1], patches]),
    }
    for key, value in weights.items():
        if key.startswith(("backbone.blocks.", "backbone.norm.")):
            converted[key.replace("backbone.", "trunk.", 1)] = value
    return converted


def _by_frequency(kernel: Tensor) -> Tensor:
    """``[n, 1, time, frequency]`` as rows of pixels, frequency by time: ``[n, pixels]``."""
    return kernel[:, 0].transpose(1, 2).flatten(1)


def _directions(weights: dict[str, Tensor], layer: str) -> Tensor:
    """The rows of a weight-normalised layer, whose lengths the code keeps at 1.

    PyTorch names the two parts of such a layer in two ways, by its version.
    """
    names = (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    )
    old = f"head_cls.{layer}.weight_v" in weights
    length, direction = (weights[f"head_cls.{layer}.{name}"] for name in names[not old])
    if not (length == 1).all():
        raise ValueError(
            f"head_cls.{layer} has rows of other lengths than 1, which are not those of ASiT's "
            "classes: pass weights as its code saves them"
        )
    return direction

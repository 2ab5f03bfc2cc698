"""Audio-MAE's published weights (facebookresearch/AudioMAE, CC BY-NC 4.0).

Its patches and windows run over time first and frequency second, ours the other way round: kernels,
predicted pixels and offsets between patches are transposed. Its positions are fixed, so the tables
that it stores are not taken over but looked up: they say how they were computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models import AudioMAE, AudioMAEPretraining
from fastast.tokens import PatchGeometry, SinCosPositions


def from_state_dict(weights: dict[str, Tensor], config: dict) -> AudioMAE | AudioMAEPretraining:
    """Converts pre-trained weights (with ``decoder_*``) or fine-tuned ones (with ``head``).

    Pre-trained weights give an :class:`~fastast.models.AudioMAEPretraining`; with
    ``config["num_classes"]``, an :class:`~fastast.models.AudioMAE` that starts from them with a new
    classifier. Fine-tuned weights give an :class:`~fastast.models.AudioMAE`.

    ``config``: ``num_mels`` (default 128), ``stride`` (default none other than the patch size),
    ``num_heads`` (default 64 channels each), and ``decoder_heads`` of a decoder that is global
    (default 16; a local one says so itself). Weights of local decoders are of windows of 4 patches,
    shifted along time alone; ``config["shift"]`` is for others.
    """
    kernel = weights["patch_embed.proj.weight"]  # [dim, 1, time, frequency]
    dim, (time, freq) = kernel.shape[0], kernel.shape[2:]
    settings = {
        "num_mels": config.get("num_mels", 128),
        "patch_size": (freq, time),
        "stride": config.get("stride"),
        "dim": dim,
        "depth": count_blocks(weights, "blocks."),
        "num_heads": config.get("num_heads", dim // 64),
    }
    geometry = PatchGeometry(settings["num_mels"], (freq, time), settings["stride"], 1)
    settings["position_wrap"] = _find_wrap(weights["pos_embed"][0], geometry)
    if "head.weight" in weights:
        model = AudioMAE(weights["head.weight"].shape[0], **settings).to(kernel.dtype)
        converted = _encoder(weights)
        for theirs, ours in (("fc_norm", "norm"), ("head", "head")):
            for part in ("weight", "bias"):
                converted[f"{ours}.{part}"] = weights[f"{theirs}.{part}"]
        model.load_state_dict(converted)
        return model
    pretrained = _pretrained(weights, settings, config)
    if "num_classes" not in config:
        return pretrained
    model = AudioMAE(config["num_classes"], **settings).to(kernel.dtype)
    model.start_from(pretrained)
    return model


def to_state_dict(model: AudioMAE | AudioMAEPretraining) -> dict[str, Tensor]:
    """The inverse, with tables of positions for as many patches as their ``wrap`` says, else 64.

    Raises:
        ValueError: a decoder that the original does not have.
    """
    weights, geometry, converted = model.state_dict(), model.geometry, {}
    size = geometry.patch_size
    width = model.positions.wrap or 64
    for name, value in weights.items():
        if name.startswith("trunk."):
            converted[name.removeprefix("trunk.")] = value
    kernel = weights["patch_embed.proj.weight"].unflatten(1, size).mT[:, None]
    converted |= {
        "cls_token": weights["prefix"][None],
        "pos_embed": _table(model.positions, geometry, width)[None],
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": weights["patch_embed.proj.bias"],
    }
    if isinstance(model, AudioMAE):
        for ours, theirs in (("norm", "fc_norm"), ("head", "head")):
            for part in ("weight", "bias"):
                converted[f"{theirs}.{part}"] = weights[f"{ours}.{part}"]
        return converted
    if model.decoder.global_blocks and model.decoder.local_blocks:
        raise ValueError("the original has no hybrid decoder")
    if model.decoder.local_blocks and (geometry.window, geometry.shift) != (4, (0, 2)):
        raise ValueError(
            f"the original's decoder has windows of 4 patches, shifted by 2 along time alone; this "
            f"has {geometry.window}, shifted by {geometry.shift} along frequency and time"
        )
    converted["mask_token"] = weights["decoder.mask_token"][None]
    converted["decoder_pos_embed"] = _table(model.decoder.positions, geometry, width)[None]
    for name, value in weights.items():
        if "_blocks." in name:
            if name.endswith("meta_mlp.fc1.weight"):
                value = value.flip(1)
            converted[f"decoder_blocks.{name.split('_blocks.')[1]}"] = value
    for part in ("weight", "bias"):
        for name in ("embed", "norm"):
            converted[f"decoder_{name}.{part}"] = weights[f"decoder.{name}.{part}"]
        pixels = weights[f"decoder.head.{part}"].unflatten(0, size)
        converted[f"decoder_pred.{part}"] = pixels.transpose(0, 1).flatten(0, 1)
    return converted


def _pretrained(weights: dict[str, Tensor], settings: dict, config: dict) -> AudioMAEPretraining:
    local = "decoder_blocks.0.attn.tau" in weights
    model = AudioMAEPretraining(
        **settings,
        attention="local" if local else "global",
        decoder_dim=weights["decoder_embed.weight"].shape[0],
        decoder_depth=count_blocks(weights, "decoder_blocks."),
        decoder_heads=(
            weights["decoder_blocks.0.attn.tau"].shape[0]
            if local
            else config.get("decoder_heads", 16)
        ),
        shift=config.get("shift", "time"),
    ).to(weights["mask_token"].dtype)
    blocks = f"decoder.{'local' if local else 'global'}_blocks."
    converted = _encoder(weights) | {"decoder.mask_token": weights["mask_token"][0]}
    for key, value in weights.items():
        if key.startswith("norm."):
            converted[f"trunk.{key}"] = value
        elif key.startswith("decoder_blocks."):
            if key.endswith("meta_mlp.fc1.weight"):  # [hidden, (time, frequency)]
                value = value.flip(1)
            converted[key.replace("decoder_blocks.", blocks, 1)] = value
    for part in ("weight", "bias"):
        for name in ("embed", "norm"):
            converted[f"decoder.{name}.{part}"] = weights[f"decoder_{name}.{part}"]
        pixels = weights[f"decoder_pred.{part}"].unflatten(0, settings["patch_size"][::-1])
        converted[f"decoder.head.{part}"] = pixels.transpose(0, 1).flatten(0, 1)
    model.load_state_dict(converted)
    return model


def _encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embedding, class token and blocks under our names."""
    converted = {
        "patch_embed.proj.weight": weights["patch_embed.proj.weight"][:, 0].mT.flatten(1),
        "patch_embed.proj.bias": weights["patch_embed.proj.bias"],
        "prefix": weights["cls_token"][0],
    }
    for key, value in weights.items():
        if key.startswith("blocks."):
            converted[f"trunk.{key}"] = value
    return converted


def _find_wrap(table: Tensor, geometry: PatchGeometry) -> int | None:
    """How a table of positions ``[1 + patches, dim]`` was computed.

    Raises:
        ValueError: neither as the paper says, nor as its code does.
    """
    width, rest = divmod(table.shape[0] - 1, geometry.freq_patches)
    if not rest and width:
        for wrap in (width, None):
            expected = _table(SinCosPositions(table.shape[1], wrap=wrap), geometry, width)
            if torch.allclose(table.float(), expected, rtol=0, atol=1e-2):  # half precision, too
                return wrap
    raise ValueError(
        f"pos_embed, of {table.shape[0] - 1} patches, is not that of sines and cosines on a grid "
        f"of {geometry.freq_patches} patches along frequency: config['num_mels'] "
        f"{geometry.num_mels} or config['stride'] {geometry.stride} is not the model's"
    )


def _table(positions: SinCosPositions, geometry: PatchGeometry, width: int) -> Tensor:
    """The table ``[1 + patches, dim]`` that the original stores, for so many patches along time."""
    plain = PatchGeometry(geometry.num_mels, geometry.patch_size, geometry.stride, 1)
    rows = positions(plain.grid([(width - 1) * plain.stride[1] + plain.patch_size[1]]))
    by_time = rows[1:].unflatten(0, (plain.freq_patches, width)).transpose(0, 1)
    return torch.cat([rows[:1], by_time.flatten(0, 1)])

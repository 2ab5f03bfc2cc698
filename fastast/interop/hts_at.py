"""HTS-AT's published weights (RetroCirce/HTS-Audio-Transformer, MIT)."""

from __future__ import annotations

from torch import Tensor

from fastast.interop.keys import count_blocks
from fastast.models import HTSAT
from fastast.models.hts_at import NEIGHBOURS

PREFIX = "sed_model."


def from_state_dict(weights: dict[str, Tensor], config: dict) -> HTSAT:
    """Converts the whole model but its front end, which is ``MelFilterbank(preset="htsat")``.

    Tables that follow from the sizes (window indices and masks, filterbank) and the unused ``head``
    are left out. The result stretches clips, as the original does (``fit="stretch"``).

    ``config``: ``image_size`` (the original's ``spec_size``, default 256) and ``fit``. ``mean`` and
    ``std``: make the model one for spectrograms normalised as ``(x - mean) / (2 std)``, instead of
    decibels.
    """
    weights = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    kernel = weights["patch_embed.proj.weight"]  # [dim, 1, height, width]
    conv = weights["tscam_conv.weight"]  # [classes, dim, rows, columns]
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    stages = count_blocks(weights, "layers.")
    tables = [weights[table.format(stage)].shape for stage in range(stages)]
    model = HTSAT(
        conv.shape[0],
        num_mels=weights["bn0.weight"].shape[0],
        image_size=config.get("image_size", 256),
        patch_size=tuple(kernel.shape[2:]),
        dim=kernel.shape[0],
        depths=[count_blocks(weights, f"layers.{stage}.blocks.") for stage in range(stages)],
        num_heads=[heads for _, heads in tables],
        window=[(round(offsets**0.5) + 1) // 2 for offsets, _ in tables],
        fit=config.get("fit", "stretch"),
    ).to(kernel.dtype)
    skipped = ("spectrogram_extractor.", "logmel_extractor.", "head.", "tscam_conv.")
    tables_of_sizes = (".attn_mask", ".relative_position_index")
    converted = {
        key: value
        for key, value in weights.items()
        if not key.startswith(skipped) and not key.endswith(tables_of_sizes)
    }
    converted["patch_embed.proj.weight"] = kernel.flatten(1)
    converted["head.weight"] = conv.permute(0, 3, 2, 1).flatten(1)
    converted["head.bias"] = weights["tscam_conv.bias"]
    # Averaged checkpoints hold it as a fraction.
    converted["bn0.num_batches_tracked"] = weights["bn0.num_batches_tracked"].long()
    if ("mean" in config) != ("std" in config):
        raise ValueError("config has one of 'mean' and 'std': give both, or neither")
    if "mean" in config:
        mean, spread = config["mean"], 2 * config["std"]
        eps = model.bn0.eps
        converted["bn0.running_mean"] = (weights["bn0.running_mean"] - mean) / spread
        # With it, `variance + eps` is as much smaller.
        converted["bn0.running_var"] = (weights["bn0.running_var"] + eps) / spread**2 - eps
    model.load_state_dict(converted)
    return model


def to_state_dict(model: HTSAT) -> dict[str, Tensor]:
    """The inverse, without the front end and the tables that follow from the sizes.

    Only of models of decibels: ``mean`` and ``std`` are not taken back.
    """
    converted = {f"{PREFIX}{key}": value for key, value in model.state_dict().items()}
    kernel = converted[f"{PREFIX}patch_embed.proj.weight"]
    converted[f"{PREFIX}patch_embed.proj.weight"] = kernel.unflatten(
        1, (1, *model.geometry.patch_size)
    )
    head = converted.pop(f"{PREFIX}head.weight")
    conv = head.unflatten(1, (NEIGHBOURS, model.last_grid[0], -1)).permute(0, 3, 2, 1)
    converted[f"{PREFIX}tscam_conv.weight"] = conv
    converted[f"{PREFIX}tscam_conv.bias"] = converted.pop(f"{PREFIX}head.bias")
    return converted

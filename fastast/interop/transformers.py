"""AST as Hugging Face's transformers has it (``ASTForAudioClassification``), both ways.

Models that were published there are AST's own (BSD-3-Clause). The library has renamed its modules
since; files keep the first names, and a state dict that comes from memory may have the new ones.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from fastast.models import AST

_ROOT = "audio_spectrogram_transformer."
_EMBEDDINGS = f"{_ROOT}embeddings."
_PATCHES = f"{_EMBEDDINGS}patch_embeddings.projection."

_TO_OUR_NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
    (r"\.attention\.q_proj\.", ".query."),
    (r"\.attention\.k_proj\.", ".key."),
    (r"\.attention\.v_proj\.", ".value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layers\.", "trunk.blocks."),
    (r"^layernorm\.", "trunk.norm."),
)
_LAYER_NORM_EPS = 1e-12
"""That of the library's default configuration, which its published ASTs have."""


def from_state_dict(weights: dict[str, Tensor], config: dict) -> AST:
    """Converts ``audio_spectrogram_transformer.*`` and ``classifier.*``.

    ``config`` is the model's own, a ``config.json`` as a dict: ``num_mel_bins`` (default 128),
    ``max_length`` (1,024), ``frequency_stride`` and ``time_stride`` (10), ``num_attention_heads``
    (default: 64 channels each) and ``layer_norm_eps`` (1e-12) are read.
    """
    kernel = weights[f"{_PATCHES}weight"]  # [dim, 1, height, width]
    dim = kernel.shape[0]
    blocks: dict[str, dict[str, Tensor]] = {}
    converted = {
        "patch_embed.proj.weight": kernel.flatten(1),
        "patch_embed.proj.bias": weights[f"{_PATCHES}bias"],
        "prefix": torch.cat(
            [weights[f"{_EMBEDDINGS}{name}_token"] for name in ("cls", "distillation")], 1
        )[0],
        "positions.table": weights[f"{_EMBEDDINGS}position_embeddings"][0],
    }
    for key, value in weights.items():
        if not key.startswith(_ROOT) or key.startswith(_EMBEDDINGS):
            continue
        name = key.removeprefix(_ROOT)
        for pattern, ours in _TO_OUR_NAMES:
            name = re.sub(pattern, ours, name)
        found = re.fullmatch(r"(trunk\.blocks\.\d+)\.(query|key|value)\.(weight|bias)", name)
        if found:
            block, part, kind = found.groups()
            blocks.setdefault(f"{block}.attn.qkv.{kind}", {})[part] = value
        else:
            converted[name] = value
    for name, parts in blocks.items():
        converted[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    for part in ("weight", "bias"):
        converted[f"norm.{part}"] = weights[f"classifier.layernorm.{part}"]
        converted[f"head.{part}"] = weights[f"classifier.dense.{part}"]
    depth = sum(name.endswith(".attn.qkv.weight") for name in blocks)
    model = AST(
        weights["classifier.dense.weight"].shape[0],
        input_frames=config.get("max_length", 1024),
        num_mels=config.get("num_mel_bins", 128),
        patch_size=tuple(kernel.shape[2:]),
        stride=(config.get("frequency_stride", 10), config.get("time_stride", 10)),
        dim=dim,
        depth=depth,
        num_heads=config.get("num_attention_heads", dim // 64),
        mlp_ratio=converted["trunk.blocks.0.mlp.fc1.weight"].shape[0] / dim,
    ).to(kernel.dtype)
    model.load_state_dict(converted)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("layer_norm_eps", _LAYER_NORM_EPS)
    return model


def to_state_dict(model: AST) -> dict[str, Tensor]:
    """The inverse of :func:`from_state_dict`, with the names that files have."""
    height, width = model.geometry.patch_size
    weights = model.state_dict()
    converted = {
        f"{_EMBEDDINGS}cls_token": weights["prefix"][None, :1],
        f"{_EMBEDDINGS}distillation_token": weights["prefix"][None, 1:],
        f"{_EMBEDDINGS}position_embeddings": weights["positions.table"][None],
        f"{_PATCHES}weight": weights["patch_embed.proj.weight"].unflatten(1, (1, height, width)),
        f"{_PATCHES}bias": weights["patch_embed.proj.bias"],
    }
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for part in ("weight", "bias"):
        converted[f"{_ROOT}layernorm.{part}"] = weights[f"trunk.norm.{part}"]
        converted[f"classifier.layernorm.{part}"] = weights[f"norm.{part}"]
        converted[f"classifier.dense.{part}"] = weights[f"head.{part}"]
        for number in range(len(model.trunk.blocks)):
            ours, theirs = f"trunk.blocks.{number}.", f"{_ROOT}encoder.layer.{number}."
            for name, renamed in names.items():
                converted[f"{theirs}{renamed}.{part}"] = weights[f"{ours}{name}.{part}"]
            thirds = weights[f"{ours}attn.qkv.{part}"].chunk(3)
            for name, value in zip(("query", "key", "value"), thirds, strict=True):
                converted[f"{theirs}attention.attention.{name}.{part}"] = value
    return converted


def config_of(model: AST, class_names: list[str], *, multi_label: bool) -> dict:
    """The ``config.json`` that goes with :func:`to_state_dict`.

    Raises:
        ValueError: a model that the library has no place for.
    """
    geometry, block = model.geometry, model.trunk.blocks[0]
    height, width = geometry.patch_size
    if height != width or geometry.prefix != 2 or geometry.time_pool != 1:
        raise ValueError(
            f"transformers has ASTs of square patches, two class tokens and no pooling alone; this "
            f"one has patches of {height} x {width}, {geometry.prefix} class tokens and pools "
            f"{geometry.time_pool} frames"
        )
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": "audio-spectrogram-transformer",
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.prefix.shape[1],
        "intermediate_size": block.mlp.fc1.out_features,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(model.trunk.blocks),
        # One number there; the classifier's, 1e-5 in AST, is rounded to the trunk's.
        "layer_norm_eps": model.trunk.norm.eps,
        "max_length": model.input_frames,
        "num_mel_bins": geometry.num_mels,
        "patch_size": height,
        "frequency_stride": geometry.stride[0],
        "time_stride": geometry.stride[1],
        "qkv_bias": True,
        "problem_type": f"{'multi' if multi_label else 'single'}_label_classification",
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: number for number, name in enumerate(class_names)},
    }


def feature_extractor_of(
    sample_rate: int, num_mels: int, max_length: int, mean: float, std: float
) -> dict:
    """The ``preprocessor_config.json`` that goes with them: ``(x - mean) / (2 std)`` there too."""
    return {
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "sampling_rate": sample_rate,
        "num_mel_bins": num_mels,
        "max_length": max_length,
        "mean": mean,
        "std": std,
        "do_normalize": True,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }

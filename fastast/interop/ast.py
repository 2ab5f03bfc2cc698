"""AST's published weights (YuanGongND/ast, BSD-3-Clause; a timm 0.4.5 DeiT inside)."""

from __future__ import annotations

from torch import Tensor

from fastast.interop.keys import ast_entries, count_blocks
from fastast.models import AST


def from_state_dict(weights: dict[str, Tensor], config: dict) -> AST:
    """Converts ``v.*`` and ``mlp_head.*``; the unused ImageNet heads are left out.

    ``config``: ``stride`` (default 10 both ways) and ``num_mels`` (default 128). The input length
    follows from the position table: the shortest that gives its number of columns, unless
    ``input_frames`` says otherwise.
    """
    kernel = weights["v.patch_embed.proj.weight"]  # [dim, 1, height, width]
    dim, _, height, width = kernel.shape
    stride = config.get("stride", (10, 10))
    num_mels = config.get("num_mels", 128)
    freq_patches = (num_mels - height) // stride[0] + 1
    patches = weights["v.pos_embed"].shape[1] - 2
    time_patches, rest = divmod(patches, freq_patches)
    if rest:
        raise ValueError(
            f"v.pos_embed has {patches} patches, which do not fill {freq_patches} rows of "
            f"frequency: config['stride'] {tuple(stride)} or config['num_mels'] {num_mels} is "
            "not the model's"
        )
    model = AST(
        weights["mlp_head.1.weight"].shape[0],
        input_frames=config.get("input_frames", (time_patches - 1) * stride[1] + width),
        num_mels=num_mels,
        patch_size=(height, width),
        stride=stride,
        dim=dim,
        depth=count_blocks(weights, "v.blocks."),
        num_heads=dim // 64,
    ).to(kernel.dtype)
    model.load_state_dict(ast_entries(weights, "v.patch_embed.proj", "v.pos_embed"))
    return model

"""FlexiAST's published weights (JiuFengSC/FlexiAST_INTERSPEECH23, which states no licence)."""

from __future__ import annotations

from torch import Tensor

from fastast.interop.grid_vit import encoder, head, to_encoder, to_head, trunk_size
from fastast.models import FlexiAST

_NAMES = ("patch_embed.proj", "pos_embed.pos_embed")


def from_state_dict(weights: dict[str, Tensor], config: dict) -> FlexiAST:
    """Converts ``v.*``, ``patch_embed.*``, ``pos_embed.*`` and ``mlp_head.*``.

    The unused ImageNet heads are left out, and so are ``v.patch_embed.*`` and ``v.pos_embed``:
    those of the model that training began from, which the original keeps and does not use.
    ``config``: ``num_mels`` (default 128) and ``resize`` (``"pi"``, or ``"bilinear"``). The input
    length follows from the position table. The model has a distillation token if the weights do.
    """
    kernel = weights["patch_embed.proj.weight"]  # [dim, 1, height, width]
    height, width = kernel.shape[2:]
    distilled = "v.dist_token" in weights
    num_mels = config.get("num_mels", 128)
    patches = weights["pos_embed.pos_embed"].shape[1] - 1 - distilled
    time_patches, rest = divmod(patches, num_mels // height)
    if rest:
        raise ValueError(
            f"pos_embed.pos_embed has {patches} patches, which do not fill {num_mels // height} "
            f"rows of frequency: config['num_mels'] {num_mels} is not the model's"
        )
    model = FlexiAST(
        weights["mlp_head.1.weight"].shape[0],
        input_frames=time_patches * width,
        num_mels=num_mels,
        patch_size=(height, width),
        resize=config.get("resize", "pi"),
        distilled=distilled,
        **trunk_size(weights),
    ).to(kernel.dtype)
    converted = encoder(weights, *_NAMES) | head(weights)
    model.load_state_dict(converted)
    return model


def to_state_dict(model: FlexiAST) -> dict[str, Tensor]:
    """The inverse, without what the original keeps and does not use."""
    return to_encoder(model, *_NAMES) | to_head(model)

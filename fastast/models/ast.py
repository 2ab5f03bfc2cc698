"""AST: the audio spectrogram transformer, a ViT with overlapping patches and a fixed input length.

Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. A class and a
distillation token (DeiT) precede each clip's patches; one table holds a learned position for each
row of the fixed grid; the mean of the two tokens is classified.
"""

from __future__ import annotations

from typing import Literal

from fastast.models.grid_vit import GridClassifier
from fastast.models.vit import register_sizes


class AST(GridClassifier):
    """Classifier for spectrograms of one length.

    Other lengths are accepted: the position table is then laid over each clip's own grid, as
    resizing it bilinearly for that length would do. What a model trained at one length makes of
    another is a different matter (ElasticAST, figures 4 and 5).

    Args:
        num_classes: of the logits.
        input_frames: frames of the clips it is made for.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches; AST's best is ``(10, 10)``, its fastest ``(16, 16)``.
        distilled: whether clips have a distillation token beside the class token (DeiT), and the
            mean of the two is classified.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.
        dim, depth, num_heads, mlp_ratio: of the trunk.

    Raises:
        ValueError: ``input_frames`` shorter than a patch, or a ``dim`` that ``num_heads`` does
            not divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_frames: int = 1024,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (10, 10),
        distilled: bool = True,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__(
            num_classes,
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=stride,
            distilled=distilled,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            time_pool=time_pool,
            time_pooling=time_pooling,
        )


register_sizes("ast", AST)

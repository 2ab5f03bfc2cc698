"""AST: the audio spectrogram transformer, a ViT with overlapping patches and a fixed input length.

Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. A class and a
distillation token (DeiT) precede each clip's patches; one table holds a learned position for each
row of the fixed grid; the mean of the two tokens is classified.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastast.models.grid_vit import GridViT, mean_of_class_tokens
from fastast.models.vit import register_sizes
from fastast.segments import Spectrograms
from fastast.tokens import PatchGrid


class AST(GridViT):
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
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=stride,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            shorter="stretch",
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)  # unlike the trunk's 1e-6, as in the original
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """What the linear classifier reads of each clip: ``[clips, dim]``, in input order.

        The mean of the two tokens after the last norm. Arguments as of :meth:`forward`.
        """
        features, grid = self.forward_features(inputs, grid)
        return self.norm(mean_of_class_tokens(features, grid))

    def forward(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
        """
        return self.head(self.embed(inputs, grid))


register_sizes("ast", AST)

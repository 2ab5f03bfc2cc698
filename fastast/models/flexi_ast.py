"""FlexiAST: an AST whose patch size is chosen when it is called.

Feng, Erol, Chung and Senocak, "FlexiAST: Flexibility is What AST Needs", Interspeech 2023. The
kernel of the patch embedding and the table of positions are kept at one patch size and resized to
the one that is asked for: the kernel by PI-resize, the table bilinearly with antialiasing. Trained
on patches of many sizes (``augment.patch_sizes`` of a recipe), one model serves all of them; small
patches cost more and tell more.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fastast.models.ast import AST
from fastast.models.grid_vit import GridViT, check_class_tokens, take_over
from fastast.models.vit import as_stream, register_sizes
from fastast.segments import Spectrograms
from fastast.tokens import (
    PatchGeometry,
    PatchGrid,
    ResizedPositions,
    resize_patch_kernel,
    resize_positions,
)


class FlexiAST(AST):
    """Classifier for patches of any size, and clips of any length.

    The patches of a batch are those of its grid: ``model.geometry_of((24, 24)).grid(lengths)``, or
    ``model(inputs, patch_size=(24, 24))``. They do not overlap. The table of positions is laid
    over each clip's own grid.

    Args:
        num_classes: of the logits.
        input_frames: frames of the clips that the table of positions is made for.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``, of the kernel that is kept, and of inputs for which no
            other is asked for.
        resize: of the kernel, ``"pi"``, or ``"bilinear"`` as the original's comparison.
        distilled: see :class:`~fastast.AST`.
        dim, depth, num_heads, mlp_ratio: of the trunk.

    Raises:
        ValueError: an unknown ``resize``, ``input_frames`` shorter than a patch, or a ``dim`` that
            ``num_heads`` does not divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_frames: int = 1024,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        resize: Literal["pi", "bilinear"] = "pi",
        distilled: bool = False,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        if resize not in ("pi", "bilinear"):
            raise ValueError(f"resize must be 'pi' or 'bilinear', got {resize!r}")
        super().__init__(
            num_classes,
            input_frames=input_frames,
            num_mels=num_mels,
            patch_size=patch_size,
            stride=patch_size,
            distilled=distilled,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
        )
        self.patch_embed.resize = resize

    def _make_positions(self, time_patches: int, dim: int) -> nn.Module:
        geometry = self.geometry
        return ResizedPositions(geometry.prefix, geometry.freq_patches, time_patches, dim)

    def geometry_of(self, patch_size: tuple[int, int]) -> PatchGeometry:
        """What lists the tokens of clips in patches of that size, ``(mel bins, frames)``."""
        return self.geometry.with_patch_size(patch_size)

    def start_from(self, other: GridViT) -> None:
        """Takes over a trained AST, as flexification begins: all of it, resized to this model.

        The kernel gets this model's ``patch_size`` by its ``resize``, whatever the strides are; the
        table of positions gets its grid, averaged where that is coarser. Norm and classifier come
        along where the classes are as many. Other models are taken over as by any AST.

        Args:
            other: with a trunk of the same size: an AST of patches of any size, such as 8 x 8 or
                16 x 16; or another ViT with this model's.

        Raises:
            ValueError: class tokens, patches or trunk of another number or size.
        """
        if not isinstance(other, AST):
            return super().start_from(other)
        check_class_tokens(self, other)
        weights = {name: value.detach() for name, value in other.state_dict().items()}
        kernel = weights["patch_embed.proj.weight"].unflatten(1, other.geometry.patch_size)
        kernel = resize_patch_kernel(kernel, self.geometry.patch_size, self.patch_embed.resize)
        weights["patch_embed.proj.weight"] = kernel.flatten(1)
        weights["positions.table"] = resize_positions(
            weights["positions.table"],
            other.positions.grid,
            self.positions.grid,
            prefix=self.geometry.prefix,
            shrink="antialias",
        )
        if weights["head.weight"].shape == self.head.weight.shape:
            return take_over(self, weights, new=())
        new = ("norm.", "head.")
        weights = {name: value for name, value in weights.items() if not name.startswith(new)}
        take_over(self, weights, new=new)

    def forward(
        self,
        inputs: Spectrograms | Tensor,
        grid: PatchGrid | None = None,
        *,
        patch_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry_of(...).grid(...)``.
            patch_size: where there is no ``grid``, the patches to make one of. Default: those that
                the kernel is kept for.

        Raises:
            ValueError: both ``grid`` and ``patch_size`` are given.
        """
        if patch_size is not None:
            if grid is not None:
                raise ValueError("grid has a patch size already: leave patch_size or grid out")
            _, grid = as_stream(inputs, None, self.geometry_of(patch_size))
        return super().forward(inputs, grid)


register_sizes("flexi_ast", FlexiAST)

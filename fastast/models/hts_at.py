"""HTS-AT: a hierarchical audio transformer, with a head that says what sounds when.

Chen, Du, Zhu, Ma, Berg-Kirkpatrick and Dubnov, "HTS-AT: A Hierarchical Token-Semantic Audio
Transformer for Sound Classification and Detection", ICASSP 2022. A Swin transformer (Liu et al.,
2021) reads the spectrogram folded into an image (:mod:`fastast.tokens.fold`): attention within
windows, and between stages every two by two patches are merged. A convolution over the last grid
gives each column of it, 320 ms of sound, its own logits (section 2.2); their mean is the clip's.

Clips of any length share a batch: each makes an image of as many chunks as it fills. The image of
ten seconds is the published one, 256 x 256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.registry import register_model
from fastast.models.vit import Mlp, PatchEmbed, as_stream, init_vit_weights
from fastast.nn import MeanPool, WindowAttention
from fastast.nn.drop_path import drop_path_factors
from fastast.nn.frame_norm import FrameNorm
from fastast.ops.window_attention import window_attention_flops
from fastast.ops.window_grids import WindowGrids
from fastast.segments import Segments, Spectrograms
from fastast.tokens import FoldGeometry, FoldGrid, fold_patches

IMAGE_SIZE = 256
"""Frames of a chunk of the published model."""

FITS = ("pad", "stretch")
NEIGHBOURS = 3
"""Columns that the token-semantic convolution sees: one to either side."""


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a LayerNorm and around a residual connection.

    Shape:
        ``x [rows, dim], grids -> [rows, dim]``. ``factors`` multiply the two branches,
        ``[rows, 2]``.
    """

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grids: WindowGrids, factors: Tensor | None = None) -> Tensor:
        branch = self.attn(self.norm1(x), grids)
        x = x + (branch if factors is None else branch * factors[:, :1].to(branch.dtype))
        branch = self.mlp(self.norm2(x))
        return x + (branch if factors is None else branch * factors[:, 1:].to(branch.dtype))


class PatchMerging(nn.Module):
    """Every two by two patches as one of twice the width (Swin, section 3.1).

    Args:
        dim: of the patches.
        width: patches in a row of the grid. All clips have it, and an even number of rows.

    Shape:
        ``[rows, dim] -> [rows / 4, 2 * dim]``.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        quads = x.view(-1, 2, self.width // 2, 2, dim)  # row and column, each with its parity
        # The four in column-major order, as in Swin.
        quads = quads.permute(0, 2, 3, 1, 4).reshape(-1, 4 * dim)
        return self.reduction(self.norm(quads))


class Stage(nn.Module):
    """Blocks on one grid, every second one with displaced windows, and what merges its patches."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        merged_width: int | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window, mlp_ratio) for _ in range(depth)
        )
        self.downsample = None if merged_width is None else PatchMerging(dim, merged_width)

    def forward(
        self,
        x: Tensor,
        windows: tuple[WindowGrids, WindowGrids],
        factors: Sequence[Tensor | None],
    ) -> Tensor:
        for index, (block, factor) in enumerate(zip(self.blocks, factors, strict=True)):
            x = block(x, windows[index % 2], factor)
        return x if self.downsample is None else self.downsample(x)


class FoldEmbed(PatchEmbed):
    """Patches of the folded spectrograms, each projected to a token, and a LayerNorm."""

    def __init__(self, geometry: FoldGeometry, dim: int) -> None:
        super().__init__(geometry, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, frames: Tensor, grid: FoldGrid) -> Tensor:
        return self.norm(self.proj(fold_patches(frames, grid)))


class HTSAT(nn.Module):
    """Classifier and detector for spectrograms of any lengths.

    Args:
        num_classes: of the logits.
        num_mels: mel bins of the input.
        image_size: frames of a chunk, the side of the image of ``image_size / num_mels`` chunks:
            256 at a frame shift of 10 ms; 128 at 40 ms is a coarse image of the same ten seconds.
        patch_size: ``(mel bins, frames)``; patches do not overlap.
        dim: of the first stage; each stage doubles it.
        depths, num_heads: of each stage.
        window: patches along the side of a window; one number, or one for each stage. Where a grid
            is smaller, windows are cut to it, as if the bias table were.
        mlp_ratio: hidden width of the MLP over that of the stage.
        drop_path: probability that a residual branch of the last block is left out in training;
            it rises to that linearly over the blocks.
        fit: what becomes of a last chunk that a clip does not fill. ``"pad"``, the paper's: zeros
            after the batch normalisation. ``"stretch"``, the code's: cubic interpolation along
            time, of clips shorter than ``image_size / num_mels`` chunks to that many (1,001 frames
            become 1,024), of longer ones to the next whole chunk. (The code classifies crops of
            longer clips, and cannot take those over twenty seconds.)

    Attributes:
        geometry: makes the ``grid`` of a batch, see :class:`~fastast.tokens.FoldGeometry`.

    Raises:
        ValueError: an unknown ``fit``, stages that do not match, or sizes that do not divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_mels: int = 64,
        image_size: int = IMAGE_SIZE,
        patch_size: tuple[int, int] = (4, 4),
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window: int | Sequence[int] = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        fit: str = "pad",
    ) -> None:
        super().__init__()
        if fit not in FITS:
            raise ValueError(f"fit must be one of {FITS}, got {fit!r}")
        windows = (window,) * len(depths) if isinstance(window, int) else tuple(window)
        for name, values in (("num_heads", num_heads), ("window", windows)):
            if len(values) != len(depths):
                raise ValueError(
                    f"{name} has {len(values)} entries for the {len(depths)} stages of depths"
                )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        if image_size % num_mels and fit == "stretch":
            raise ValueError(
                f"image_size ({image_size}) must be a multiple of num_mels ({num_mels}) with "
                "fit='stretch'"
            )
        self.geometry = FoldGeometry(
            num_mels,
            patch_size,
            chunk_frames=image_size,
            windows=windows,
            stretch_to=image_size // num_mels if fit == "stretch" else 0,
        )
        self.drop_path = drop_path
        last = len(depths) - 1
        self.last_grid = tuple(size >> last for size in self.geometry.chunk_patches)
        self.bn0 = FrameNorm(num_mels)
        self.patch_embed = FoldEmbed(self.geometry, dim)
        width = self.geometry.chunk_patches[1]
        self.layers = nn.ModuleList(
            Stage(
                dim << stage,
                depth,
                heads,
                windows[stage],
                mlp_ratio,
                width >> stage if stage < last else None,
            )
            for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        self.norm = nn.LayerNorm(dim << last)
        self.pool = MeanPool()
        # The token-semantic convolution, over all of the last grid's rows and three columns.
        self.head = nn.Linear(NEIGHBOURS * self.last_grid[0] * (dim << last), num_classes)
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").repeat_interleave(2)
        self.register_buffer("drop_rates", rates, persistent=False)
        self.layers.apply(init_vit_weights)

    def forward_features(
        self,
        inputs: Spectrograms | Tensor,
        grid: FoldGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, FoldGrid]:
        """Columns ``[columns, rows, dim]`` of the last grid in order of time, after the last norm.

        There are ``grid.columns`` of them: one for every ``image_size / 8`` frames.
        """
        frames, grid = as_stream(inputs, grid, self.geometry)
        alive = _alive(inputs, grid, frames.shape[0])
        x = self.patch_embed(self.bn0(frames, alive), grid)
        drops = self._drop_factors(grid, keys)
        for index, (stage, windows) in enumerate(zip(self.layers, grid.windows, strict=True)):
            # Each merging leaves a quarter of the rows, and a clip's stay together.
            clip, depth = grid.clip[:: 4**index], len(stage.blocks)
            factors = [None if drop is None else F.embedding(clip, drop) for drop in drops[:depth]]
            x, drops = stage(x, windows, factors), drops[depth:]
        height, width = self.last_grid
        x = self.norm(x).view(-1, height, width, x.shape[-1])
        return x.transpose(1, 2).flatten(0, 1), grid

    def _drop_factors(self, grid: FoldGrid, keys: Tensor | None) -> Sequence[Tensor | None]:
        """For each block, factors ``[clips + 1, 2]`` of its branches; the last is of dead rows."""
        if not (self.training and self.drop_path):
            return [None] * sum(len(stage.blocks) for stage in self.layers)
        if keys is None:
            shape = (grid.segments.num_segments,)
            keys = torch.randint(1 << 62, shape, device=grid.clip.device)
        factors = F.pad(drop_path_factors(keys, self.drop_rates), (0, 0, 0, 1))
        return factors.unflatten(1, (-1, 2)).unbind(1)

    def embed(self, inputs: Spectrograms | Tensor, grid: FoldGrid | None = None) -> Tensor:
        """Mean of the last grid of each clip: ``[clips, dim]``, in input order.

        HTS-AT's ``latent_output``. The classifier reads the same patches, but by threes. Arguments
        as of :meth:`forward`.
        """
        features, grid = self.forward_features(inputs, grid)
        return self.pool(features.mean(1), grid.columns)

    def frame_logits(
        self,
        inputs: Spectrograms | Tensor,
        grid: FoldGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Segments]:
        """What sounds when: logits ``[columns, num_classes]``, and whose clip each column is.

        A column stands for ``image_size / 8`` frames, 320 ms as published. With ``fit="stretch"``
        they are frames of the stretched clip. Arguments as of :meth:`forward`.
        """
        features, grid = self.forward_features(inputs, grid, keys=keys)
        x = features.flatten(1)
        clip = grid.columns.row_ids(x.shape[0])
        same = (clip[1:] == clip[:-1])[:, None]
        # Beyond its ends, a clip is surrounded by zeros.
        before = F.pad(torch.where(same, x[:-1], 0), (0, 0, 1, 0))
        after = F.pad(torch.where(same, x[1:], 0), (0, 0, 0, 1))
        return self.head(torch.cat([before, x, after], 1)), grid.columns

    def forward(
        self,
        inputs: Spectrograms | Tensor,
        grid: FoldGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``; decibels
                as of the ``htsat`` filterbank in published models.
            grid: of the batch, from ``model.geometry.grid(...)``; made here if missing.
            keys: int64 ``[clips]``, see :func:`~fastast.nn.drop_path.drop_path_keys`: what is
                dropped in training. Default: drawn from PyTorch's generator.
        """
        logits, columns = self.frame_logits(inputs, grid, keys=keys)
        return self.pool(logits, columns)

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each, patches of the first stage; see
        :mod:`fastast.models.flops`.

        The first product's input needs a gradient, for the batch normalisation before it.
        """
        height, width = self.geometry.chunk_patches
        chunks = np.asarray(tokens, np.int64) // (height * width)
        sizes = self.geometry.stage_sizes(chunks)
        rows = [int(grids.prod(1).sum()) for grids in sizes]
        total = flops.embedding(self.patch_embed, rows[0])
        for stage, count, grids, window in zip(
            self.layers, rows, sizes, self.geometry.windows, strict=True
        ):
            for index, block in enumerate(stage.blocks):
                dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
                windows = WindowGrids.from_sizes(grids, window, index % 2 * (window // 2))
                total += flops.linear(count, dim, 4 * dim) + 2 * flops.linear(count, dim, hidden)
                total += window_attention_flops(windows.host_windows, 1, dim)
            if stage.downsample is not None:
                merge = stage.downsample.reduction
                total += flops.linear(count // 4, merge.in_features, merge.out_features)
        columns = rows[-1] // self.last_grid[0]
        head = flops.linear(columns, self.head.in_features, self.head.out_features)
        return Flops(total + head, 0)


def _alive(inputs: Spectrograms | Tensor, grid: FoldGrid, rows: int) -> Tensor:
    """Which rows of the frame stream belong to a clip: bool ``[rows]``."""
    if isinstance(inputs, Spectrograms):
        return inputs.segments.row_mask(rows)
    clips = grid.segments.lengths > 0
    return clips[: inputs.shape[0], None].expand(-1, inputs.shape[1]).flatten()


register_model("hts_at_tiny", HTSAT)


def resize_windows(
    state_dict: Mapping[str, Tensor], windows: Sequence[int], *, mode: str = "crop"
) -> dict[str, Tensor]:
    """The weights of an HTS-AT for windows of other sizes: a new state dict.

    Only the tables of relative position biases depend on the size of a window. Between images of
    different sizes (256 and 128: fine and coarse) nothing need be done while windows keep theirs:
    on a grid smaller than a window, the middle of the table is used. What this function is for are
    models whose windows follow their grids, such as HTS-AT's code makes them: at 128 x 128 those of
    the last stage have 4 patches instead of 8.

    Args:
        state_dict: of an :class:`HTSAT`. It is not changed.
        windows: patches along the side of a window, of each stage.
        mode: ``"crop"``: biases stay with their offsets in patches; a table is cut to its middle,
            or put into the middle of a larger one of zeros. ``"bicubic"`` (Swin's code, for
            other windows) and ``"bilinear"`` (coarse-to-fine, for positions): the table is resized
            as an image, so that biases stay with their offsets in shares of the window.

    Raises:
        ValueError: an unknown ``mode``, or another number of stages.
    """
    if mode not in ("crop", "bicubic", "bilinear"):
        raise ValueError(f"mode must be 'crop', 'bicubic' or 'bilinear', got {mode!r}")
    tables = [key for key in state_dict if key.endswith(".relative_position_bias_table")]
    stages = {key: int(key.split("layers.")[1].split(".")[0]) for key in tables}
    if len(windows) != 1 + max(stages.values(), default=-1):
        raise ValueError(
            f"windows has {len(windows)} entries but the state dict has "
            f"{1 + max(stages.values(), default=-1)} stages"
        )
    return {
        key: resize_bias_table(value, windows[stages[key]], mode) if key in stages else value
        for key, value in state_dict.items()
    }


def resize_bias_table(table: Tensor, window: int, mode: str = "crop") -> Tensor:
    """One table ``[(2 w - 1)**2, heads]`` of :func:`resize_windows`, for windows of ``window``."""
    old, new = round(table.shape[0] ** 0.5), 2 * window - 1
    if old == new:
        return table
    image = table.t().unflatten(1, (old, old))[None]
    if mode == "crop":
        margin = (new - old) // 2  # both are odd
        image = F.pad(image, (margin,) * 4)
    else:
        image = F.interpolate(image, (new, new), mode=mode, align_corners=False)
    return image[0].flatten(1).t().contiguous()

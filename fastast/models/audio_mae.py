"""Audio-MAE: a masked autoencoder of spectrograms, and the classifier that its encoder becomes.

Huang, Xu, Li, Baevski, Auli, Galuba, Metze and Feichtenhofer, "Masked Autoencoders that Listen",
NeurIPS 2022. A ViT with fixed sinusoidal positions encodes the patches that are not masked, a fifth
of them. A decoder sees what it has made of them, in their places among mask tokens, and restores
the others; it attends within windows of patches, which every second block displaces, or globally
(section 3, "Decoder with Local Attention"). :class:`AudioMAEPretraining` is both of them,
:class:`AudioMAE` the encoder with a classifier on the mean of the patches.

Only patches that are seen are ever cut out and embedded, and only hidden ones are restored and
compared: what the masks leave out is in no tensor (:mod:`fastast.tokens.masked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import flops
from fastast.models.flops import Flops
from fastast.models.grid_vit import mean_of_patches, take_over
from fastast.models.registry import register_model
from fastast.models.vit import TRUNK_SIZES, Block, Mlp, PatchEmbed, Trunk, TrunkSize, as_stream
from fastast.nn import ContinuousPositionBias, WindowAttention
from fastast.nn.drop_path import drop_path_factors
from fastast.ops.window_attention import window_attention_flops
from fastast.ops.window_grids import WindowGrids
from fastast.segments import Spectrograms
from fastast.tokens import (
    Mask,
    MaskedGeometry,
    MaskedGrid,
    PatchGeometry,
    PatchGrid,
    SinCosPositions,
    Split,
    UnstructuredMask,
)

SIZES = TRUNK_SIZES | {"large": TrunkSize(1024, 24, 16)}

DECODER_DEPTHS = {"local": 16, "global": 8, "hybrid": 12}
"""Blocks of each kind of decoder (table 1c); of a hybrid's, the last four are global."""

SHIFTS = ("both", "time", "none")


class AudioMAEEncoder(nn.Module):
    """Patch embedding, class token, fixed positions and trunk.

    Args:
        geometry: of the patches.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        position_wrap: see ``wrap`` of :class:`~fastast.tokens.SinCosPositions`.
    """

    def __init__(
        self,
        geometry: PatchGeometry,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        position_wrap: int | None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.patch_embed = PatchEmbed(geometry, dim)
        self.prefix = nn.Parameter(torch.empty(geometry.prefix, dim))
        self.positions = SinCosPositions(dim, wrap=position_wrap)
        self.trunk = Trunk(dim, depth, num_heads, mlp_ratio=mlp_ratio)

    def init_weights(self) -> None:
        """Initialises all weights as MAE does; for the end of a subclass's ``__init__``."""
        nn.init.normal_(self.prefix, std=0.02)
        self.apply(_init_linear)

    def encode(self, frames: Tensor, grid: PatchGrid, drops: Tensor | None = None) -> Tensor:
        """Features ``[rows, dim]`` of the tokens that a grid lists, which see each other alone.

        Args:
            frames: ``[rows, num_mels]``, the stream that the grid points into.
            grid: the tokens.
            drops: of the trunk's residual branches.
        """
        embedded = self.patch_embed(frames, grid)
        prefix = F.embedding(grid.prefix_id.clamp(min=0), self.prefix).to(embedded.dtype)
        tokens = torch.where((grid.prefix_id >= 0)[:, None], prefix, embedded)
        return self.trunk(tokens + self.positions(grid), grid.segments, drops)

    def encoding_flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of the encoder, for clips of so many tokens each that it sees, the class token included;
        see :mod:`fastast.models.flops`."""
        tokens = np.asarray(tokens, np.int64)
        total, clips = int(tokens.sum()), int((tokens > 0).sum())
        first = flops.embedding(self.patch_embed, total - self.geometry.prefix * clips)
        return Flops(first + flops.blocks(self.trunk, total, flops.pairs(tokens)), first)


class AudioMAE(AudioMAEEncoder):
    """Classifier for spectrograms of any lengths, fine-tuned from a pre-trained encoder.

    Training may leave out whole times and frequencies of each clip: give it a ``grid`` without
    them (``augment.time_drop`` and ``freq_drop`` of a recipe).

    Args:
        num_classes: of the logits.
        num_mels: mel bins of the input.
        patch_size: ``(mel bins, frames)``.
        stride: between patches. Default: they do not overlap, as in pre-training.
        dim, depth, num_heads, mlp_ratio: of the trunk.
        drop_path: probability that a residual branch of the last block is left out in training; it
            rises to that linearly over the blocks.
        position_wrap: compute positions as the published code does, for weights that were trained
            with them: 64. See ``wrap`` of :class:`~fastast.tokens.SinCosPositions`.
        time_pool, time_pooling: of frames before patches are cut, see :class:`PatchGeometry`.

    Raises:
        ValueError: a ``drop_path`` out of range, or a ``dim`` that ``num_heads`` or 4 does not
            divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        position_wrap: int | None = None,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        geometry = PatchGeometry(num_mels, patch_size, stride, 1, time_pool, time_pooling)
        super().__init__(geometry, dim, depth, num_heads, mlp_ratio, position_wrap)
        self.trunk.norm = nn.Identity()  # what is normalised is the mean
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.drop_path = drop_path
        rates = torch.linspace(0, drop_path, depth, device="cpu").repeat_interleave(2)
        self.register_buffer("drop_rates", rates, persistent=False)
        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward_features(
        self,
        inputs: Spectrograms | Tensor,
        grid: PatchGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, PatchGrid]:
        """Token features ``[rows, dim]`` after the trunk, and the list of what each row is."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        drops = None
        if self.training and self.drop_path:
            if keys is None:
                shape = (grid.segments.num_segments,)
                keys = torch.randint(1 << 62, shape, device=frames.device)
            drops = drop_path_factors(keys, self.drop_rates)
        return self.encode(frames, grid, drops), grid

    def embed(
        self,
        inputs: Spectrograms | Tensor,
        grid: PatchGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> Tensor:
        """What the linear classifier reads of each clip: ``[clips, dim]``, in input order.

        The mean of its patches after the norm. Arguments as of :meth:`forward`.
        """
        return self.norm(mean_of_patches(*self.forward_features(inputs, grid, keys=keys)))

    def forward(
        self,
        inputs: Spectrograms | Tensor,
        grid: PatchGrid | None = None,
        *,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[clips, num_classes]`` in input order.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            grid: the token list, from ``model.geometry.grid(...)``; made here if missing.
            keys: int64 ``[clips]``, see :func:`~fastast.nn.drop_path.drop_path_keys`: what is
                dropped in training. Default: drawn from PyTorch's generator.
        """
        return self.head(self.embed(inputs, grid, keys=keys))

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each, the class token included; see
        :mod:`fastast.models.flops`."""
        clips = int((np.asarray(tokens) > 0).sum())
        head = flops.linear(clips, self.head.in_features, self.head.out_features)
        return self.encoding_flops(tokens) + Flops(head, 0)

    def start_from(self, other: AudioMAE | AudioMAEPretraining) -> None:
        """Takes over embedding, class token and blocks. Norm and classifier stay as they are.

        Args:
            other: a model with patches and a trunk of the same sizes; its stride and mel bins may
                be others.

        Raises:
            ValueError: patches or trunk of other sizes, or positions of another kind.
        """
        if not isinstance(other, AudioMAEEncoder):
            raise ValueError(f"an Audio-MAE starts from an Audio-MAE, not {type(other).__name__}")
        if other.geometry.patch_size != self.geometry.patch_size:
            raise ValueError(
                f"patch_size {self.geometry.patch_size} differs from the pre-trained "
                f"{other.geometry.patch_size}: use patches of one size"
            )
        if other.positions.wrap != self.positions.wrap:
            raise ValueError(
                f"position_wrap is {self.positions.wrap}, but was {other.positions.wrap} in "
                "pre-training: use the same positions"
            )
        parts = ("patch_embed.", "prefix", "trunk.blocks.")
        weights = {name: v for name, v in other.state_dict().items() if name.startswith(parts)}
        take_over(self, weights, new=("trunk.norm.", "norm.", "head."))


class WindowBlock(nn.Module):
    """Window attention and MLP, each before a LayerNorm and within a residual connection.

    The block of Swin v2 (Liu et al., 2022, section 3.2), which Audio-MAE's code decodes with:
    scores are cosines over a learned temperature, their bias is made by a network.

    Shape:
        ``x [rows, dim], grids -> [rows, dim]``.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, mlp_ratio: float, bias_dropout: float
    ) -> None:
        super().__init__()
        bias = ContinuousPositionBias(num_heads, window, dropout=bias_dropout)
        self.attn = WindowAttention(dim, num_heads, window, cosine=True, meta_mlp=bias)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, grids: WindowGrids) -> Tensor:
        x = x + self.norm1(self.attn(x, grids))
        return x + self.norm2(self.mlp(x))


class Decoder(nn.Module):
    """From the features of what was seen to the pixels of what was not.

    Args:
        inputs: width of the features.
        pixels: of a patch.
        dim, depth, num_heads, mlp_ratio: of the blocks.
        num_global: how many of the blocks, the last ones, attend to the whole clip, as those of the
            encoder do; the others to their window.
        window: patches along the side of a window.
        bias_dropout: of the networks that make the windows' biases.
        position_wrap: see ``wrap`` of :class:`~fastast.tokens.SinCosPositions`.
    """

    def __init__(
        self,
        inputs: int,
        pixels: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_global: int,
        window: int,
        bias_dropout: float,
        position_wrap: int | None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.positions = SinCosPositions(dim, wrap=position_wrap)
        self.local_blocks = nn.ModuleList(
            WindowBlock(dim, num_heads, window, mlp_ratio, bias_dropout)
            for _ in range(depth - num_global)
        )
        self.global_blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio) for _ in range(num_global)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, grid: MaskedGrid, split: Split) -> Tensor:
        """Features ``[grid.decoded.num_rows, dim]`` of all patches, before the last norm.

        Args:
            features: ``[grid.encoded_rows, inputs]``, of the tokens that were encoded.
            grid: of the batch.
            split: of the grid, by the mask.
        """
        embedded = self.embed(features)
        seen = F.embedding(split.source.clamp(min=0), embedded)
        mask_token = self.mask_token.to(embedded.dtype)
        x = torch.where((split.source >= 0)[:, None], seen, mask_token)
        x = x + self.positions(grid.decoded)
        for index, block in enumerate(self.local_blocks):
            x = block(x, grid.windows[index % 2])
        for block in self.global_blocks:
            x = block(x, grid.decoded.segments)
        return x

    def restore(self, features: Tensor) -> Tensor:
        """Pixels of patches, from their features."""
        return self.head(self.norm(features))


class Restored(NamedTuple):
    """What :class:`AudioMAEPretraining` makes of the patches that were hidden from it.

    Attributes:
        prediction: ``[grid.hidden_rows, patch_freq * patch_time]``.
        patches: of the same shape, as they were; zeros on dead rows.
    """

    prediction: Tensor
    patches: Tensor


class AudioMAEPretraining(AudioMAEEncoder):
    """The masked autoencoder. Defaults are the paper's.

    Args:
        num_mels, patch_size, stride, dim, depth, num_heads, mlp_ratio, position_wrap, time_pool,
            time_pooling: as of :class:`AudioMAE`.
        mask: which patches are hidden. Default: four fifths, one by one.
        attention: of the decoder, to windows (``"local"``), to the whole clip (``"global"``), or
            first the one and then the other (``"hybrid"``). A global decoder sees the class token,
            as the code's does.
        decoder_dim, decoder_depth, decoder_heads: of the decoder. The default of the second is 16,
            8 and 12.
        decoder_global: global blocks of a hybrid decoder.
        window: patches along the side of a window.
        shift: along which axes every second block displaces its windows by half: ``"both"`` (the
            paper), ``"time"`` (the code) or ``"none"``.
        bias_dropout: of the networks that make the windows' biases. In the code 0.1, for each pair
            of patches.

    Attributes:
        geometry: a :class:`~fastast.tokens.MaskedGeometry`, whose grids hold all that a batch
            needs.

    Raises:
        ValueError: an unknown ``attention`` or ``shift``, or numbers out of range.
    """

    def __init__(
        self,
        *,
        num_mels: int = 128,
        patch_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        mask: Mask | None = None,
        attention: Literal["local", "global", "hybrid"] = "local",
        decoder_dim: int = 512,
        decoder_depth: int | None = None,
        decoder_heads: int = 16,
        decoder_global: int = 4,
        window: int = 4,
        shift: Literal["both", "time", "none"] = "both",
        bias_dropout: float = 0.0,
        position_wrap: int | None = None,
        time_pool: int = 1,
        time_pooling: Literal["average", "max"] = "average",
    ) -> None:
        if attention not in DECODER_DEPTHS:
            raise ValueError(f"attention must be one of {tuple(DECODER_DEPTHS)}, got {attention!r}")
        if shift not in SHIFTS:
            raise ValueError(f"shift must be one of {SHIFTS}, got {shift!r}")
        if decoder_depth is None:
            decoder_depth = DECODER_DEPTHS[attention]
        num_global = {"local": 0, "global": decoder_depth, "hybrid": decoder_global}[attention]
        if not 0 <= num_global <= decoder_depth:
            raise ValueError(
                f"decoder_global must lie in 0, ..., decoder_depth ({decoder_depth}), got "
                f"{num_global}"
            )
        by = window // 2
        geometry = MaskedGeometry(
            num_mels,
            patch_size,
            stride,
            1,
            time_pool,
            time_pooling,
            mask=mask or UnstructuredMask(0.8),
            window=None if attention == "global" else window,
            shift={"both": (by, by), "time": (0, by), "none": (0, 0)}[shift],
            decode_prefix=attention == "global",
        )
        super().__init__(geometry, dim, depth, num_heads, mlp_ratio, position_wrap)
        self.decoder = Decoder(
            dim,
            geometry.patch_size[0] * geometry.patch_size[1],
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            mlp_ratio=mlp_ratio,
            num_global=num_global,
            window=window,
            bias_dropout=bias_dropout,
            position_wrap=position_wrap,
        )
        self.init_weights()

    def forward(
        self, inputs: Spectrograms | Tensor, masked: Tensor, grid: MaskedGrid | None = None
    ) -> Restored:
        """Restores the patches that are masked from those that are not.

        Args:
            inputs: :class:`~fastast.Spectrograms`, or dense ``[clips, frames, num_mels]``.
            masked: bool ``[grid.num_rows]``, drawn by ``model.geometry.mask``.
            grid: from ``model.geometry.grid(...)``; made here if missing.
        """
        frames, grid = as_stream(inputs, grid, self.geometry)
        split = grid.split(masked)
        decoded = self.decoder(self.encode(frames, split.encoded), grid, split)
        last = max(grid.decoded.num_rows - 1, 0)
        features = F.embedding(split.hidden_rows.clamp(max=last), decoded)
        return Restored(self.decoder.restore(features), self.patch_embed.cut(frames, split.hidden))

    def restore(
        self, inputs: Spectrograms | Tensor, masked: Tensor, grid: MaskedGrid | None = None
    ) -> Tensor:
        """What the decoder makes of all patches, seen ones included: ``[grid.decoded.num_rows,
        pixels]``, for looking at. Arguments as of :meth:`forward`."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        split = grid.split(masked)
        decoded = self.decoder(self.encode(frames, split.encoded), grid, split)
        return self.decoder.restore(decoded)

    def embed(self, inputs: Spectrograms | Tensor, grid: PatchGrid | None = None) -> Tensor:
        """The mean of each clip's patches after the encoder, none of them masked: ``[clips,
        dim]``, in input order."""
        frames, grid = as_stream(inputs, grid, self.geometry)
        return mean_of_patches(self.encode(frames, grid), grid)

    def flops(self, tokens: Sequence[int] | np.ndarray) -> Flops:
        """Of clips of so many tokens each, the class token and masked patches included; see
        :mod:`fastast.models.flops`."""
        geometry, decoder = self.geometry, self.decoder
        freq = geometry.freq_patches
        patches = np.maximum(np.asarray(tokens, np.int64) - geometry.prefix, 0)
        width = patches // freq
        kept = geometry.mask.num_kept(freq, width)
        seen = kept + geometry.prefix * (kept > 0)
        lengths = patches + geometry.decode_prefix * geometry.prefix * (patches > 0)
        rows, dim = int(lengths.sum()), decoder.embed.out_features
        total = flops.linear(int(seen.sum()), decoder.embed.in_features, dim)
        for block in (*decoder.local_blocks, *decoder.global_blocks):
            hidden = block.mlp.fc1.out_features
            total += flops.linear(rows, dim, 4 * dim) + 2 * flops.linear(rows, dim, hidden)
        sizes = np.stack([freq * (width > 0), width], 1)
        displaced = len(decoder.local_blocks) // 2
        plain = len(decoder.local_blocks) - displaced
        for blocks, shift in ((plain, (0, 0)), (displaced, geometry.shift)):
            if blocks:
                windows = WindowGrids.from_sizes(sizes, geometry.window, shift)
                total += blocks * window_attention_flops(windows.host_windows, 1, dim)
        total += len(decoder.global_blocks) * flops.attention(flops.pairs(lengths), dim)
        total += flops.linear(int((patches - kept).sum()), dim, decoder.head.out_features)
        return self.encoding_flops(seen) + Flops(total, 0)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _build(
    model: type[AudioMAEEncoder], size: TrunkSize, *num_classes: int, **kwargs
) -> AudioMAEEncoder:
    return model(*num_classes, **(asdict(size) | kwargs))


for _size, _trunk in SIZES.items():
    register_model(
        f"audio_mae_{_size}",
        partial(_build, AudioMAE, _trunk),
        pretraining=partial(_build, AudioMAEPretraining, _trunk),
    )

"""Single clips of any length outside of this library: ``torch.export`` and ONNX.

The packed stream of one clip is an ordinary sequence: its token list is arithmetic on its length,
its attention is plain attention, its pooling a softmax over all rows. So the model is traced as it
is, with its length as a symbol, and the library's operators are then replaced by PyTorch's own.
What comes out needs nothing of fastast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.models import HTSAT
from fastast.segments import Segments, Spectrograms
from fastast.tokens import PatchGeometry, PatchGrid

MOST_FRAMES = 2**15
"""Of a clip that an exported model takes: more than five minutes at 10 ms."""


class _SingleClip(nn.Module):
    """``frames [1, T, num_mels] -> logits [1, classes]``, for any T that is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        grid = _grid_of_one(self.model.geometry, frames)
        return self.model(Spectrograms(frames[0], grid.segments), grid)


def _grid_of_one(geometry: PatchGeometry, frames: Tensor) -> PatchGrid:
    """What :meth:`PatchGeometry.grid` makes of one clip, without leaving the graph."""
    width = (frames.shape[1] - geometry.patch_frames) // geometry.stride_frames + 1
    num_rows = geometry.prefix + geometry.freq_patches * width
    row = torch.arange(num_rows, dtype=torch.int32, device=frames.device)
    patch = (row - geometry.prefix).clamp(min=0)
    freq, time = patch // width, patch % width
    offsets = torch.stack([row[0], row[-1] + 1])
    segments = Segments(offsets, offsets, offsets.new_zeros(0, 4), MOST_FRAMES)
    return PatchGrid(
        segments,
        first_frame=time * geometry.stride_frames,
        freq=freq,
        time=time,
        clip_width=torch.ones_like(row) * width,
        prefix_id=torch.where(row < geometry.prefix, row, -1),
        time_pool=torch.full_like(row, geometry.time_pool),
        geometry=geometry,
    )


def _attention(qkv: Tensor, *tables_and_scale) -> tuple[Tensor, Tensor]:
    q, k, v = (part.transpose(0, 1)[None] for part in qkv.unbind(1))
    out = F.scaled_dot_product_attention(q, k, v, scale=tables_and_scale[-1])
    return out[0].transpose(0, 1), qkv.new_zeros(())  # nobody reads the log-sum-exps


def _pooling(x: Tensor, u: Tensor, *_) -> tuple[Tensor, Tensor]:
    return ((x @ u.T).softmax(0).T @ x)[None], x.new_zeros(())


def export_single_clip(model: nn.Module) -> torch.export.ExportedProgram:
    """Traces a model of one clip.

    Args:
        model: an AST, FlexiAST (at its own patch size), SSAST or ElasticAST; in float32, on any
            device. Its mode is left alone, what is exported is inference.

    Returns:
        A program ``frames [1, T, num_mels] -> logits [1, classes]`` of PyTorch's own operators, for
        any T from a patch's width to :data:`MOST_FRAMES`. Frames are normalised as the model's
        recipe says.

    Raises:
        ValueError: a model that folds spectrograms (HTS-AT), or has no classes.
    """
    if isinstance(model, HTSAT) or not hasattr(model, "head"):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: classifiers of patches can, such as AST, "
            "SSAST and ElasticAST"
        )
    parameter = next(model.parameters())
    least = model.geometry.min_frames()
    example = torch.zeros(1, 4 * least, model.geometry.num_mels, device=parameter.device)
    time = torch.export.Dim("time", min=least, max=MOST_FRAMES)
    training = model.training
    try:
        program = torch.export.export(
            _SingleClip(model.eval()), (example,), dynamic_shapes=({1: time},)
        )
    finally:
        model.train(training)
    ops = torch.ops.fastast
    return program.run_decompositions(
        {ops.packed_attention_qkv.default: _attention, ops.segment_pool.default: _pooling}
    )

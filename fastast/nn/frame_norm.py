"""Batch normalisation of the mel bins of a packed stream of frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameNorm(nn.BatchNorm1d):
    """Batch normalisation (Ioffe and Szegedy, 2015) of each mel bin over the frames of all clips.

    The first layer of HTS-AT and PANNs (``bn0``), whose weights load. As :class:`nn.BatchNorm1d`,
    but rows that belong to no clip count for nothing and come out as zeros. Computed in float32 at
    least.

    Shape:
        ``frames [rows, num_mels]``, alive bool ``[rows] -> [rows, num_mels]``.
    """

    def forward(self, frames: Tensor, alive: Tensor) -> Tensor:
        alive = alive[:, None]
        # In full precision under autocast too, and NaN on dead rows must not reach a product.
        x = frames.to(torch.promote_types(frames.dtype, torch.float32))
        x = torch.where(alive, x, 0)
        if self.training:
            count = alive.sum().to(x.dtype)
            mean = x.sum(0) / count.clamp(min=1)
            deviation = torch.where(alive, x - mean, 0)
            variance = deviation.square().sum(0) / count.clamp(min=1)
            self._remember(mean.detach(), variance.detach(), count)
        else:
            mean, variance = self.running_mean, self.running_var
            deviation = x - mean
        out = deviation * (variance + self.eps).rsqrt() * self.weight + self.bias
        return torch.where(alive, out, 0)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        # A single frame, such as the silence in a batch without clips, has no variance to speak of.
        share = self.momentum * (count > 1).to(count.dtype)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for average, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            average.lerp_(value.to(average.dtype), share.to(average.dtype))
        self.num_batches_tracked += (count > 1).to(torch.int64)

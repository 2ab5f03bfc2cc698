"""Batches to model input."""

import pytest
import torch

from fastast import MelFilterbank
from fastast.frontend import MelFrontend, pad_or_cut
from fastast.segments import Segments, Spectrograms, TokenBudget
from tests.testing import ragged


def test_pad_or_cut_equals_padding_each_clip():
    spectrograms = ragged([5, 0, 9, 3], 4)
    dense = pad_or_cut(spectrograms, 6, fill=-7.0)
    for clip, row in zip(spectrograms.unpack(), dense, strict=True):
        kept = clip[:6]
        assert torch.equal(row[: len(kept)], kept)
        assert (row[len(kept) :] == -7).all()


def test_pad_or_cut_does_not_read_dead_rows():
    frames = torch.full((12, 4), torch.nan)
    frames[:5] = 1.0
    segments = Segments.from_lengths([2, 3], TokenBudget(12, 4, 6))
    dense = pad_or_cut(Spectrograms(frames, segments), 4, fill=0.0)
    assert dense.shape == (4, 4, 4)
    assert dense.isfinite().all()
    assert dense[2:].eq(0).all()


def test_time_mask_is_a_share():
    with pytest.raises(ValueError, match="time_mask is a share"):
        MelFrontend(MelFilterbank(), time_mask=48)

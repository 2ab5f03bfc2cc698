"""The peers compute what we compute: logits and all gradients, in float64."""

from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from bench.batches import mixed_resolution_frames
from bench.cases.elastic_ast import (
    dense_rows_step,
    packed_step,
    padded_step,
    reference,
)
from bench.peers.attention import (
    explicit_attention,
    modelled_fused_attention,
    sdpa_attention,
)
from bench.peers.dense_rows import DenseRows, RowLayout, next_fit
from bench.peers.elastic import clip_patches
from bench.peers.padded import Padded
from bench.peers.padding import Padding
from fastast import ElasticAST

# One patch, frames left over, the longest first and last, more than one row of 24 tokens.
FRAMES = [160, 16, 50, 48, 31, 96, 160]


def random_model(**options) -> ElasticAST:
    """Two mels of patches, every parameter random, the biases too."""
    torch.manual_seed(0)
    model = ElasticAST(5, num_mels=32, max_time_patches=10, dim=24, depth=2, num_heads=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.double()


def random_batch(frames=FRAMES):
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in frames]
    return clips, torch.randint(5, (len(frames),), generator=generator)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        partial(dense_rows_step, limit=24),
        padded_step,
        partial(padded_step, attention=explicit_attention),
        partial(padded_step, attention=modelled_fused_attention),
        None,
    ],
    ids=["dense rows", "padded", "padded explicit", "padded modelled", "clip by clip"],
)
def test_logits_and_gradients_equal_ours(make, scale):
    given = random_model(attention_scale=scale), *random_batch()
    ours = packed_step(*given).train()
    assert ours["logits"].shape == (len(FRAMES), 5)
    assert all(ours[name].abs().max() > 0 for name, _ in given[0].named_parameters())
    assert_equal(make(*given).train() if make else reference(*given, torch.float64), ours)


@pytest.mark.parametrize("frames", [[48], [32, 32, 32]], ids=["one clip", "equal clips"])
def test_batches_without_padding(frames):
    given = random_model(), *random_batch(frames)
    ours = packed_step(*given).train()
    assert_equal(dense_rows_step(*given).train(), ours)
    assert_equal(padded_step(*given).train(), ours)
    assert Padded(given[0]).key_mask(frames) is None


def test_what_lies_in_the_padding_does_not_matter():
    model, (clips, _) = random_model(), random_batch()
    run = Padded(model)
    mask = run.key_mask([len(clip) for clip in clips])
    zeros, garbage = (pad_sequence(clips, True, value) for value in (0.0, 1e3))
    torch.testing.assert_close(run(zeros, mask), run(garbage, mask), rtol=1e-9, atol=1e-9)


def test_the_paper_s_model_makes_its_layout_if_none_is_given():
    model, (clips, _) = random_model(), random_batch()
    run = DenseRows(model, limit=24)
    layout = run.layout([len(clip) for clip in clips])
    assert torch.equal(run(clips), run(clips, layout))


def test_next_fit_keeps_order_and_one_open_row():
    assert next_fit([3, 4, 2, 5, 1], limit=7) == [[3, 4], [2, 5], [1]]
    assert next_fit([3, 3, 3, 1], limit=7) == [[3, 3], [3, 1]]
    assert next_fit([7, 7], limit=7) == [[7], [7]]
    with pytest.raises(ValueError, match="8 tokens does not fit a row of 7"):
        next_fit([1, 8], limit=7)


def test_row_layout_separates_the_clips():
    rows = RowLayout([2, 1, 3], limit=4)
    assert rows.clip.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert rows.taken.tolist() == [0, 1, 2]
    rows = RowLayout([2, 3], limit=4)
    assert rows.clip.tolist() == [[0, 0, -1], [0, 0, 0]]
    mask = rows.attention_mask()
    assert mask[0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert rows.pool_mask().int().tolist() == [[[1, 1, 0]], [[1, 1, 1]]]


def test_padding_is_undone():
    padding = Padding([3, 1, 2])
    stream = torch.arange(1.0, 13).view(6, 2)
    batch = padding.pad(stream)
    assert batch.shape == (3, 3, 2)
    assert torch.equal(padding.unpad(batch), stream)
    assert padding.valid.sum() == 6
    assert batch[~padding.valid].abs().sum() == 0
    assert Padding([2, 2]).key_mask() is None


def test_patches_are_frequency_major():
    clip = torch.arange(4 * 6.0).view(4, 6)  # [frames, num_mels]
    patches = clip_patches(clip, (3, 2))  # 2 along frequency, 2 along time
    assert patches.shape == (4, 6)
    assert patches[1].tolist() == clip[2:4, 0:3].T.flatten().tolist()  # freq 0, time 1
    assert patches[2].tolist() == clip[0:2, 3:6].T.flatten().tolist()  # freq 1, time 0


def attention_inputs(masked: bool):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return *inputs, mask[:, None, None] if masked else None, 0.7


@pytest.mark.parametrize("masked", [False, True])
def test_the_three_attentions_agree(masked):
    given = attention_inputs(masked)
    want = explicit_attention(*given)
    for attention in (sdpa_attention, modelled_fused_attention):
        torch.testing.assert_close(attention(*given), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_modelled_operator_is_a_real_one(masked):
    given = attention_inputs(masked)
    torch.library.opcheck(torch.ops.fastast_bench.fused_attention, given)
    q, k, v, mask, scale = given
    assert torch.autograd.gradcheck(
        lambda *qkv: modelled_fused_attention(*qkv, mask, scale), (q, k, v)
    )


def test_the_batch_is_the_paper_s_mixture_of_resolutions():
    frames = mixed_resolution_frames()
    assert len(frames) == 12
    assert frames == mixed_resolution_frames()
    drawn = set(mixed_resolution_frames(clips=1000))
    assert drawn == {
        *(1024, 848, 720, 640, 560, 512, 464, 416),
        *(384, 352, 336, 320, 288, 272, 256),
    }

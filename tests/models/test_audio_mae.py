"""Audio-MAE's models: every decoder, ragged clips, and what the encoder never sees."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastast.nn.packed_attention
from bench.memory import saved_bytes, tensors_of
from fastast import Spectrograms, create_model, create_pretraining_model
from fastast.models import AudioMAE, AudioMAEPretraining
from fastast.models.flops import linear
from fastast.nn import ContinuousPositionBias
from fastast.tokens import StructuredMask, UnstructuredMask, kept_lists
from tests.testing import ragged

SMALL = {"num_mels": 32, "patch_size": (8, 8), "dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 24, "decoder_depth": 3, "decoder_heads": 2, "window": 2}
LENGTHS = [40, 100, 24, 8]
DECODERS = {
    "local": {"attention": "local"},
    "time": {"attention": "local", "shift": "time"},
    "global": {"attention": "global"},
    "hybrid": {"attention": "hybrid", "decoder_global": 1, "mask": StructuredMask(0.5, 0.3)},
}
every_decoder = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


def pretraining(**settings):
    torch.manual_seed(0)
    settings = SMALL | DECODER | {"mask": UnstructuredMask(0.7)} | settings
    return AudioMAEPretraining(**settings).double()


def masked_of(model, grid, ids):
    return model.geometry.mask(grid, model.geometry, torch.tensor(ids), seed=0, epoch=0)


@every_decoder
def test_packed_equals_one_by_one(settings):
    model, clips = pretraining(**settings), ragged(LENGTHS, 32)
    grid = model.geometry.grid(LENGTHS)
    together = model(clips, masked_of(model, grid, range(4)), grid)
    whole = model.restore(clips, masked_of(model, grid, range(4)), grid)
    begin, first = grid.hidden.host_offsets.tolist(), grid.decoded.segments.host_offsets.tolist()
    for clip, frames in enumerate(clips.unpack()):
        alone = model.geometry.grid([len(frames)])
        masked = masked_of(model, alone, [clip])
        restored = model(frames[None], masked, alone)
        rows = slice(*begin[clip : clip + 2])
        torch.testing.assert_close(together.prediction[rows], restored.prediction)
        assert torch.equal(together.patches[rows], restored.patches)
        everything = model.restore(frames[None], masked)
        torch.testing.assert_close(whole[slice(*first[clip : clip + 2])], everything)


@every_decoder
def test_hidden_patches_are_never_seen(settings):
    model = pretraining(**settings)
    frames = torch.randn(1, 64, 32, dtype=torch.float64)
    grid = model.geometry.grid([64])
    masked = masked_of(model, grid, [3])
    expected = model(frames, masked, grid)
    changed = frames.clone()
    for row in masked.nonzero()[:, 0].tolist():
        begin, freq = int(grid.first_frame[row]), 8 * int(grid.freq[row])
        changed[0, begin : begin + 8, freq : freq + 8] = torch.nan
    found = model(changed, masked, grid)
    assert torch.equal(found.prediction, expected.prediction)
    assert found.patches.isnan().all()


def test_every_parameter_learns():
    for settings in DECODERS.values():
        model, clips = pretraining(**settings), ragged(LENGTHS, 32)
        grid = model.geometry.grid(LENGTHS)
        restored = model(clips, masked_of(model, grid, range(4)), grid)
        (restored.prediction - restored.patches).square().sum().backward()
        for name, parameter in model.named_parameters():
            if not name.endswith("meta_mlp.fc2.bias"):  # the same for all scores of a softmax
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_what_the_encoder_keeps_is_what_it_sees():
    """Bytes saved for the backward follow the visible tokens, not the masked ones."""
    frames = torch.randn(16 * 64, 128)
    clips = Spectrograms.from_dense(frames[None])
    kept = {}
    for ratio in (0.0, 0.5, 0.8):
        size = SMALL | {"num_mels": 128, "patch_size": (16, 16)}
        model = AudioMAEPretraining(**size, **DECODER, mask=UnstructuredMask(ratio))
        grid = model.geometry.grid(clips.segments)
        encoded = grid.split(masked_of(model, grid, [0])).encoded
        given = [*model.parameters(), *tensors_of(encoded), frames]
        kept[encoded.num_rows] = saved_bytes(
            lambda model=model, encoded=encoded: model.encode(frames, encoded).sum(), given
        )
    assert sorted(kept) == [103, 257, 513]
    whole = kept[513]
    for rows, number in kept.items():
        assert number == pytest.approx(whole * rows / 513, rel=0.01)


def test_the_paper_s_model():
    with torch.device("meta"):
        model = create_pretraining_model("audio_mae_base")
    # The published 136,992,768 values but for the two tables of positions.
    assert sum(p.numel() for p in model.parameters()) == 136_992_768 - 513 * (768 + 512)
    assert len(model.decoder.local_blocks) == 16 and not model.decoder.global_blocks
    assert model.geometry.shift == (2, 2) and model.geometry.window == 4
    grid = model.geometry.grid([1024])
    assert (grid.encoded_rows, grid.hidden_rows) == (103, 410)
    # Multiply-adds per clip: 48.4 G of the classifier's trunk, 8.9 G of it at 103 tokens.
    assert model.encoding_flops([513]).forward == pytest.approx(2 * 48.5e9, rel=0.01)
    assert model.encoding_flops([103]).forward == pytest.approx(2 * 8.94e9, rel=0.01)
    decoder = model.flops([513]).forward - model.encoding_flops([103]).forward
    restored = linear(512 - 410, 512, 256)  # which the original computes, too
    windows = 2 * 0.13e9
    assert decoder + restored == pytest.approx(2 * 25.8e9 + windows, rel=0.01)
    for attention, blocks in (("global", (0, 8)), ("hybrid", (8, 4))):
        with torch.device("meta"):
            decoder = create_pretraining_model("audio_mae_small", attention=attention).decoder
        assert (len(decoder.local_blocks), len(decoder.global_blocks)) == blocks


@pytest.mark.parametrize("mask", [UnstructuredMask(0.7), StructuredMask(0.5, 0.3)], ids=str)
def test_training_counts_what_torch_counts(mask, monkeypatch):
    """With a global decoder; what a local one differs in is checked against the paper's size."""
    explicit = partial(fastast.nn.packed_attention.packed_attention_qkv, backend="reference")
    monkeypatch.setattr(fastast.nn.packed_attention, "packed_attention_qkv", explicit)
    model, clips = pretraining(attention="global", mask=mask), ragged(LENGTHS, 32)
    grid = model.geometry.grid(LENGTHS)
    with FlopCounterMode(display=False) as counter:
        model(clips, masked_of(model, grid, range(4)), grid).prediction.sum().backward()
    counted = model.flops(grid.segments.lengths).training
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bias_dropout():
    model = pretraining(bias_dropout=0.1)
    rates = [m.dropout.p for m in model.modules() if isinstance(m, ContinuousPositionBias)]
    assert rates == [0.1] * 3


# The classifier -------------------------------------------------------------------------------


def classifier(**settings):
    torch.manual_seed(1)
    model = AudioMAE(5, **SMALL, **settings)
    nn.init.normal_(model.head.weight)  # which begins near zero
    return model


def test_dropped_tokens_are_not_there():
    model = classifier().double().eval()
    clips = ragged(LENGTHS, 32)
    mask = StructuredMask(0.5, 0.3)
    full = model.geometry.grid(LENGTHS)
    masked = mask(full, model.geometry, torch.arange(4), seed=0, epoch=0)
    times = [model.geometry.time_patches(length) for length in LENGTHS]
    keep = kept_lists(mask, model.geometry, times, range(4), seed=0, epoch=0)
    grid = model.geometry.grid(LENGTHS, keep=keep)
    assert grid.num_rows == int((~masked).sum())
    changed = clips.frames.clone()
    for row in masked.nonzero()[:, 0].tolist():
        begin, freq = int(full.first_frame[row]), 8 * int(full.freq[row])
        changed[begin : begin + 8, freq : freq + 8] = torch.nan
    assert torch.equal(model(Spectrograms(changed, clips.segments), grid), model(clips, grid))


def test_drop_path_follows_its_keys():
    model, clips = classifier(drop_path=0.5).double(), ragged(LENGTHS, 32)
    keys = torch.arange(4)
    first = model(clips, keys=keys)
    assert torch.equal(model(clips, keys=keys), first)
    assert not torch.equal(model(clips, keys=keys + 4), first)
    assert not torch.equal(model.eval()(clips), first)
    alone = model.train()(clips.unpack()[2][None], keys=keys[2:3])
    torch.testing.assert_close(alone[0], first[2])


def test_start_from():
    source, model = pretraining().float(), classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.start_from(source)
    own, theirs = model.state_dict(), source.state_dict()
    for name, value in own.items():
        new = name.startswith(("norm.", "head."))
        assert torch.equal(value, before[name] if new else theirs[name]), name
    other = classifier()
    other.start_from(model)
    assert torch.equal(other.prefix, model.prefix)
    for wrong, message in (
        (pretraining(patch_size=(16, 8)), r"patch_size \(8, 8\) differs"),
        (pretraining(depth=3), r"trunk\.blocks\.2.* same dim, depth and num_heads"),
        (pretraining(position_wrap=64), "position_wrap is None, but was 64 in pre-training"),
        (nn.Identity(), "starts from an Audio-MAE, not Identity"),
    ):
        with pytest.raises(ValueError, match=message):
            model.start_from(wrong)


def test_what_makes_no_sense_says_so():
    for settings, message in (
        ({"attention": "far"}, "attention must be one of"),
        ({"shift": "up"}, "shift must be one of"),
        ({"attention": "hybrid", "decoder_global": 4}, "decoder_global must lie in 0, ..., "),
    ):
        with pytest.raises(ValueError, match=message):
            pretraining(**settings)
    with pytest.raises(ValueError, match="drop_path must lie in"):
        create_model("audio_mae_small", 3, drop_path=1.0)

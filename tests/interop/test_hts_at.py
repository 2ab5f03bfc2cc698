"""HTS-AT reproduces what its published code computed."""

import numpy as np
import pytest
import torch

from fastast import HTSAT, MelFilterbank, Spectrograms, from_reference
from fastast.models.hts_at import SwinBlock
from fastast.ops.mel_plan import slaney_triangles, window_function
from fastast.ops.window_grids import WindowGrids
from fastast.tokens import FoldGeometry, fold_frames
from tests.ssl_golden import SslGolden, dot_probe, formula_wave
from tests.testing import formula_input

MELS, CHUNK = 64, 256


@pytest.fixture
def golden(shared_dir):
    return lambda name: SslGolden(shared_dir, name)


def record(model, inputs):
    """What each part of the model returned: by name."""
    found = {}
    parts = {"bn": model.bn0, "patch_embed": model.patch_embed}
    parts |= {f"stage{index}": stage for index, stage in enumerate(model.layers)}
    handles = [
        part.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, part in parts.items()
    ]
    found["logits"], found["columns"] = model.frame_logits(inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["htsat_audioset_10s", "htsat_audioset_1024frames"])
@torch.inference_mode()
def test_model(golden, name):
    fixture = golden(name)
    clips, samples = fixture.case["inputs"]["shape"]
    frames = MelFilterbank(preset="htsat")(formula_wave(clips, samples, 32000))
    fixture.check("n_frames", frames.shape[1])
    fixture.check("logmel_first8", frames[:, :8])
    fixture.check("logmel_bin_mean", frames.mean(1))
    fixture.check("logmel_bin_std", frames.std(1, unbiased=False))
    fixture.check("logmel_frame_probe", dot_probe(frames))

    model = from_reference(fixture.state_dict(), "hts_at")
    inputs = Spectrograms.from_list(list(frames))
    found = record(model, inputs)
    normal = found["bn"].unflatten(0, (clips, -1))
    fixture.check("bn_first8", normal[:, :8])
    grid = model.geometry.grid(inputs.segments)
    image = images(fold_frames(normal.flatten(0, 1), grid), clips)
    fixture.check("image_rows", image[:, fixture.arrays["image_row_index"]])
    fixture.check("image_row_mean", image.mean(2))
    fixture.check("image_row_probe", dot_probe(image))
    for part in ("patch_embed", "stage0", "stage1", "stage2", "stage3"):
        fixture.check_tokens(part, found[part].unflatten(0, (clips, -1)))

    by_column = found["logits"].unflatten(0, (clips, 32))
    fixture.check("tscam_logits", by_column.transpose(1, 2)[:, :64])
    fixture.check("framewise_output", by_column.sigmoid()[..., :64])
    fixture.check("framewise_all_mean", by_column.sigmoid().mean(1))
    logits = model(frames)
    fixture.check("clipwise_logits", logits)
    fixture.check("clipwise_output", logits.sigmoid())
    fixture.check("latent_output", model.embed(frames))


def images(chunks: torch.Tensor, clips: int) -> torch.Tensor:
    """The folded frames ``[clips * chunks * 256, 64]`` as images ``[clips, 256, 256]``."""
    return chunks.view(clips, -1, CHUNK, MELS).transpose(2, 3).flatten(1, 2)


def test_fold(golden):
    fixture = golden("htsat_reshape")
    geometry = FoldGeometry(MELS, (4, 4), chunk_frames=CHUNK, stretch_to=4)
    for frames in (1024, 1001):
        x = formula_input("input", (2, 1, frames, MELS))[:, 0]
        grid = geometry.grid([frames] * 2)
        image = images(fold_frames(x.flatten(0, 1), grid), 2)
        fixture.check(f"T{frames}_rows", image[:, fixture.arrays["row_index"]])
        fixture.check(f"T{frames}_row_mean", image.mean(2))
        fixture.check(f"T{frames}_row_probe", dot_probe(image))


def test_front_end(golden):
    fixture = golden("htsat_frontend_32k")
    mel = slaney_triangles(32000, MELS, 1024, 50, 14000).float()
    mel = torch.nn.functional.pad(mel, (0, 1))  # of the 513 bins, the last has no weight
    fixture.check("mel_sum_per_band", mel.sum(1))
    fixture.check("mel_first_bin", (mel > 0).int().argmax(1).int())
    fixture.check("mel_count", (mel > 0).sum(1).int())
    fixture.check("mel_peak", mel.amax(1))
    fixture.check("mel_probe", dot_probe(mel))
    window = window_function("hanning", 1025)[:-1].float()
    fixture.check("stft_real_dc", window)
    angle = 2 * np.pi * 5 * torch.arange(64, dtype=torch.float64) / 1024
    fixture.check("stft_imag_bin5_first64", -angle.sin().float() * window[:64])


@torch.inference_mode()
def test_block(golden):
    fixture = golden("htsat_block_stage0_plain")
    block = SwinBlock(96, 4, 8, 4.0)
    block.load_state_dict(fixture.weights("layers.0.blocks.0."))
    x = formula_input("input", (1, 4096, 96))[0]
    out = block(x, WindowGrids.from_sizes([(64, 64)], 8))[None]
    fixture.check_tokens("out", out)
    fixture.check("out_last4", out[:, -4:])


@torch.inference_mode()
def test_normalised_spectrograms(golden):
    """Conversion for spectrograms that the front end normalises."""
    weights = golden("htsat_audioset_10s").state_dict()
    clip = 10 * torch.randn(1, 300, MELS).double() - 30
    decibels = from_reference(weights, "hts_at", {"fit": "pad"}).double()
    normal = from_reference(weights, "hts_at", {"fit": "pad", "mean": -30.0, "std": 10.0}).double()
    found = normal((clip + 30) / 20)
    torch.testing.assert_close(found, decibels(clip), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_converted_says_so(golden):
    weights = golden("htsat_audioset_10s").state_dict()
    with pytest.raises(ValueError, match="config has one of 'mean' and 'std'"):
        from_reference(weights, "hts_at", {"mean": -30.0})
    del weights["sed_model.bn0.weight"]
    with pytest.raises(ValueError, match=r"bn0\.weight.*hts_at family"):
        from_reference(weights, "hts_at")


def test_published_size():
    with torch.device("meta"):
        model = HTSAT(527)
    # HTS-AT's 30,241,687 without the 527 x 528 numbers of a layer that it does not use.
    assert sum(p.numel() for p in model.parameters()) == 30_241_687 - 527 * 528

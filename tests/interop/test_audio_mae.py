"""Converted Audio-MAE models reproduce what the original computed, pre-training and fine-tuned."""

import numpy as np
import pytest
import torch

from fastast import Spectrograms, from_reference
from fastast.methods.audio_mae import patch_errors
from fastast.models import AudioMAE, AudioMAEPretraining
from fastast.tokens import PatchGeometry, SinCosPositions
from tests.ssl_golden import SslGolden
from tests.testing import formula_input

FREQ, TIME, CLIPS = 8, 64, 2


@pytest.fixture(scope="module")
def golden(shared_dir):
    return lambda name: SslGolden(shared_dir, name)


def sincos(dim, first, second):
    """Table rows of places along two axes, in NumPy, and zeros of the class token before them."""
    rate = 1.0 / 10000 ** (np.arange(dim // 4) / (dim // 4))
    angles = [np.outer(place, rate) for place in (first, second)]
    rows = [part for angle in angles for part in (np.sin(angle), np.cos(angle))]
    return torch.from_numpy(np.pad(np.concatenate(rows, 1), ((1, 0), (0, 0)))).float()


def as_published(dim):
    """The table of the published models: of a grid that is taken for the transposed one."""
    count = np.arange(FREQ * TIME)
    return sincos(dim, count % TIME, count // TIME)


def by_time(rows, clips=CLIPS, time=TIME):
    """Rows of patches as the original orders them: ``[clips, patches, ...]``, frequency fastest."""
    return rows.unflatten(0, (clips, -1, time)).transpose(1, 2).flatten(1, 2)


def pixels_by_time(patches):
    """Pixels of a patch as the original orders them, frequency fastest."""
    return patches.unflatten(-1, (16, 16)).mT.flatten(-2)


@pytest.mark.parametrize(
    "name, dim, geometry, frames, wrap",
    [
        ("sincos_768_1024x128", 768, PatchGeometry(prefix=1), 1024, 64),
        ("sincos_512_1024x128", 512, PatchGeometry(prefix=1), 1024, 64),
        ("sincos_768_overlap_101x12", 768, PatchGeometry(128, (16, 16), (10, 10), 1), 1024, None),
        ("sincos_768_square14", 768, PatchGeometry(224, prefix=1), 224, None),
    ],
)
def test_positions(golden, name, dim, geometry, frames, wrap):
    fixture = golden(name)
    rows = SinCosPositions(dim, wrap=wrap)(geometry.grid([frames]))
    width = geometry.time_patches(frames)
    table = torch.cat([rows[:1], by_time(rows[1:], 1, width)[0]])
    if wrap:
        torch.testing.assert_close(table, as_published(dim), rtol=0, atol=1e-7)
    fixture.check("rows", table[fixture.arrays["row_index"]])
    fixture.check_tokens("row", table)


@torch.inference_mode()
def test_pretraining(golden):
    fixture = golden("mae_pretrain_vitb_swin")
    weights = fixture.state_dict()
    weights["pos_embed"], weights["decoder_pos_embed"] = (
        as_published(dim)[None] for dim in (768, 512)
    )
    model = from_reference(weights, "audio_mae")
    assert isinstance(model, AudioMAEPretraining) and model.positions.wrap == 64
    batch = formula_input("input", (CLIPS, 1, 1024, 128))[:, 0]
    grid = model.geometry.grid([1024] * CLIPS)

    # Theirs: [clips, time x frequency]; ours: a class token and frequency x time.
    theirs = torch.from_numpy(fixture.arrays["mask"]).bool()
    ours = theirs.unflatten(1, (TIME, FREQ)).mT.flatten(1)
    masked = torch.nn.functional.pad(ours, (1, 0)).flatten()
    assert torch.equal(grid.hidden.lengths, theirs.sum(1).int())

    found = {}
    for name, module in {
        "enc_block0": model.trunk.blocks[0],
        "latent": model.trunk,
        "dec_block0": model.decoder.local_blocks[0],
        "dec_block1": model.decoder.local_blocks[1],
        "dec_blocks_out": model.decoder,
    }.items():
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
    restored = model(Spectrograms.from_list(list(batch)), masked, grid)

    # The original hands on kept tokens in the order of the noise.
    order = torch.from_numpy(fixture.arrays["noise"]).argsort(1)[:, :102]
    rank = (~ours).cumsum(1).unflatten(1, (FREQ, TIME)).mT.flatten(1).gather(1, order)
    for name in ("enc_block0", "latent"):
        tokens = found[name].unflatten(0, (CLIPS, -1))
        patches = tokens.gather(1, rank[..., None].expand(-1, -1, 768))
        fixture.check_tokens(name, torch.cat([tokens[:, :1], patches], 1))
    for name in ("dec_block0", "dec_block1", "dec_blocks_out"):
        fixture.check_tokens(name, by_time(found[name]))
    prediction = model.decoder.restore(found["dec_blocks_out"])
    fixture.check_tokens("pred", pixels_by_time(by_time(prediction)))
    patches = model.patch_embed.cut(batch.flatten(0, 1), grid.decoded)
    fixture.check_tokens("target", pixels_by_time(by_time(patches)), 2)
    embedded = model.patch_embed.proj(patches)
    fixture.check_tokens("patch_embed", by_time(embedded))

    hidden = grid.split(masked).hidden_rows
    torch.testing.assert_close(restored.prediction, prediction[hidden], rtol=0, atol=2e-6)
    assert torch.equal(restored.patches, patches[hidden])
    for name, normalise in (("norm_pix", True), ("raw", False)):
        errors = patch_errors(prediction, patches, normalise)
        fixture.check(f"per_token_loss_{name}", by_time(errors))
        loss = patch_errors(*restored, normalise).mean()
        fixture.check(f"loss_{name}", loss)


@torch.inference_mode()
def test_fine_tuned(golden):
    fixture = golden("mae_finetune_vitb_527")
    weights = fixture.state_dict() | {"pos_embed": as_published(768)[None]}
    model = from_reference(weights, "audio_mae")
    assert isinstance(model, AudioMAE) and not model.training
    # The number of parameters that the original's log gives.
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_659_407
    batch = formula_input("input", (CLIPS, 1, 1024, 128))[:, 0]
    found = []
    model.trunk.register_forward_hook(lambda _, __, out: found.append(out))
    # Among clips of other lengths, each is as it is alone.
    pooled = model.embed(Spectrograms.from_list([*batch, torch.randn(100, 128)]))[:CLIPS]
    fixture.check("pooled", pooled)
    fixture.check("logits", model.head(pooled))
    tokens = found[0][: CLIPS * (1 + FREQ * TIME)].unflatten(0, (CLIPS, -1))
    patches = by_time(tokens[:, 1:].flatten(0, 1))
    fixture.check_tokens("tokens", torch.cat([tokens[:, :1], patches], 1))

    for number, drop in enumerate((0.2, 0.3)):
        keep = []
        times = fixture.arrays[f"noise_t{number}"].argsort(1)[:, : int(TIME * (1 - drop))]
        freqs = fixture.arrays[f"noise_f{number}"].argsort(1)[:, : int(FREQ * (1 - drop))]
        for time, freq in zip(times, freqs, strict=True):
            keep.append(np.sort((freq[:, None] * TIME + time).flatten()))
        grid = model.geometry.grid([1024] * CLIPS, keep=keep)
        fixture.check(f"n_tokens_masked{number}", np.asarray(grid.num_rows // CLIPS))
        pooled = model.embed(batch, grid)
        fixture.check(f"pooled_masked{number}", pooled)
        fixture.check(f"logits_masked{number}", model.head(pooled))


def test_what_cannot_be_converted_says_so(golden):
    weights = golden("mae_finetune_vitb_527").state_dict()  # with positions of zeros
    with pytest.raises(ValueError, match="pos_embed, of 512 patches, is not that of sines"):
        from_reference(weights, "audio_mae")
    with pytest.raises(ValueError, match=r"config\['num_mels'\] 96 .* is not the model's"):
        from_reference(weights, "audio_mae", {"num_mels": 96})
    del weights["patch_embed.proj.weight"]
    with pytest.raises(ValueError, match=r"no 'patch_embed\.proj\.weight'.*audio_mae family"):
        from_reference(weights, "audio_mae")

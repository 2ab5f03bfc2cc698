"""Embeddings of waveforms, in the words of the evaluation suites."""

from dataclasses import replace

import pytest
import torch

from fastast.train import fit, load_data, load_model
from fastast.train import hear as hear_api
from fastast.train.embed import embed
from fastast.train.encoder import Encoder
from fastast.train.s3prl import UpstreamExpert

KINDS = ["elastic_ast", "ast", "ssast_patch", "hts_at"]


@pytest.fixture(params=KINDS)
def run(request, recipe, tmp_path):
    recipe.frontend = replace(recipe.frontend, compression=[1.0])
    if request.param != "elastic_ast":
        recipe.model = replace(recipe.model, name=f"{request.param}_tiny", max_time_patches=None)
    if request.param == "ast":
        recipe.model.stride = (16, 8)
        recipe.frontend.fixed_seconds = 0.5
    if request.param == "ssast_patch":
        recipe.model.patch_size = (8, 8)
        recipe.data.max_seconds = 1.0
        recipe.augment = replace(recipe.augment, time_mask=0.0)
        recipe.train.method = "ssast"
    if request.param == "hts_at":
        recipe.model = replace(
            recipe.model,
            patch_size=None,
            depth=None,
            dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            image_size=64,
            window=4,
        )
        recipe.train.batch_tokens = 1024
    recipe.train.max_steps = 2
    fit(recipe, tmp_path / "run", quiet=True)
    return tmp_path / "run"


@torch.no_grad()
def test_clips_are_what_embed_writes(run):
    method, recipe, _ = load_model(run)
    data = load_data(recipe.data).test
    (chunk,) = embed(method, recipe, data, "cpu")
    encoder = Encoder.load(run)
    waveforms = [data.waveform(row) for row in range(len(data))]
    if recipe.frontend.fixed_seconds is not None:  # which reads the beginning alone
        waveforms = [waveform[:4000] for waveform in waveforms]
    found = encoder.clips(waveforms)
    assert found.shape[1] == encoder.output_dim
    torch.testing.assert_close(found, chunk.vectors, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_frames(run):
    encoder = Encoder.load(run)
    clips = [0.1 * torch.randn(samples) for samples in (8000, 100, 3000, 20000)]
    together = encoder.frames(clips)
    assert together.vectors.shape == (4, max(together.lengths), encoder.output_dim)
    for row, clip in enumerate(clips):  # alone it is the same, and what follows it is zero
        alone = encoder.frames([clip])
        assert alone.lengths == [together.lengths[row]]
        own = together.vectors[row, : alone.lengths[0]]
        torch.testing.assert_close(own, alone.vectors[0], rtol=1e-4, atol=1e-5)
        assert not together.vectors[row, alone.lengths[0] :].any()
    seconds = together.lengths[3] * encoder.hop_ms / 1000
    assert seconds == pytest.approx(2.5, abs=0.6)
    steps = together.times_ms.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, encoder.hop_ms))


@torch.no_grad()
def test_hear(run):
    """What HEAR's validator asks for: types, shapes, regular times."""
    model = hear_api.load_model(str(run))
    assert isinstance(model, torch.nn.Module) and isinstance(model.scene_embedding_size, int)
    audio = 2 * torch.rand(3, 2 * model.sample_rate) - 1
    scenes = hear_api.get_scene_embeddings(audio, model)
    assert scenes.shape == (3, model.scene_embedding_size) and scenes.dtype == torch.float32
    vectors, times = hear_api.get_timestamp_embeddings(audio, model)
    assert vectors.shape[:2] == times.shape and vectors.dtype == torch.float32
    assert vectors.shape[2] == model.timestamp_embedding_size
    assert ((times.diff() - times.diff().mean()).abs() < 1e-3).all()
    assert not vectors.requires_grad


def test_x_ares(run):
    """What X-ARES's checker asks for."""
    encoder = Encoder.load(run)
    assert type(encoder).__name__.endswith("Encoder")
    vectors = encoder(torch.randn(2, 50000))
    assert vectors.ndim == 3 and vectors.shape[0] == 2
    assert vectors.shape[2] == encoder.output_dim
    assert encoder.sampling_rate == 8000
    # So that labels in time meet the frames they belong to.
    assert vectors.shape[1] == pytest.approx(6250 / encoder.hop_size_in_ms, abs=8)


def test_s3prl(run):
    with pytest.raises(ValueError, match="the model is for 8000 Hz"):
        UpstreamExpert(str(run))

"""transformers' classifier and ours: one call, one result."""

import numpy as np
import pytest
import torch

from fastast import Spectrograms

transformers = pytest.importorskip("transformers")
from fastast.interop.hugging_face import ASTForAudioClassification  # noqa: E402

MELS = 32


@pytest.fixture(params=[60, 128, 300])
def original(request):
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_length=request.param,
        num_mel_bins=MELS,
        id2label={0: "bark", 1: "meow", 2: "moo"},
        label2id={"bark": 0, "meow": 1, "moo": 2},
    )
    model = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def spectrograms(model, clips=3):
    return torch.randn(clips, model.config.max_length, MELS)


@pytest.mark.parametrize("labels", ["none", "single", "multi"])
def test_outputs(original, labels):
    inputs = spectrograms(original)
    targets = {
        "none": None,
        "single": torch.tensor([2, 0, 1]),
        "multi": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]),
    }[labels]
    if targets is not None:
        original.config.problem_type = f"{labels}_label_classification"
    ours = ASTForAudioClassification.from_transformers(original)
    with torch.no_grad():
        expected = original(inputs, labels=targets, output_hidden_states=True)
        found = ours(inputs, labels=targets, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert (found.loss is None) == (targets is None)
    if targets is not None:
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    assert len(found.hidden_states) == 3
    for ours_state, state in zip(found.hidden_states[:2], expected.hidden_states, strict=False):
        torch.testing.assert_close(ours_state, state, rtol=0, atol=1e-5)


def test_gradients(original):
    inputs, labels = spectrograms(original), torch.tensor([2, 0, 1])
    ours = ASTForAudioClassification.from_transformers(original)
    original(inputs, labels=labels).loss.backward()
    ours(inputs, labels=labels).loss.backward()
    theirs = original.audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight
    mine = ours.model.patch_embed.proj.weight.grad
    torch.testing.assert_close(mine, theirs.grad.flatten(1), rtol=1e-4, atol=1e-6)


def test_folders_go_both_ways(original, tmp_path):
    inputs = spectrograms(original)
    original.save_pretrained(tmp_path / "theirs")
    ours = ASTForAudioClassification.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = original(inputs).logits
        torch.testing.assert_close(ours(inputs).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(back(inputs).logits, expected)
    assert back.config.id2label == original.config.id2label


def test_clips_of_any_length(original):
    """In one batch, and as each comes out alone."""
    ours = ASTForAudioClassification.from_transformers(original)
    clips = [torch.randn(frames, MELS) for frames in (50, original.config.max_length, 17)]
    with torch.no_grad():
        together = ours(clips, output_hidden_states=True)
        stream = ours(Spectrograms.from_list(clips)).logits
        alone = torch.cat([ours(clip[None]).logits for clip in clips])
    torch.testing.assert_close(together.logits, alone, rtol=0, atol=1e-5)
    assert torch.equal(together.logits, stream)
    assert together.hidden_states[0].ndim == 2


def test_in_a_pipeline(original):
    extractor = transformers.ASTFeatureExtractor(
        num_mel_bins=MELS, max_length=original.config.max_length, mean=-4.0, std=4.0
    )
    sound = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    found = [
        transformers.pipeline("audio-classification", model=model, feature_extractor=extractor)(
            sound, top_k=3
        )
        for model in (original, ASTForAudioClassification.from_transformers(original))
    ]
    assert [row["label"] for row in found[0]] == [row["label"] for row in found[1]]
    scores = [[row["score"] for row in rows] for rows in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_what_does_not_fit_says_so(original, tmp_path):
    config = transformers.ASTConfig(hidden_dropout_prob=0.1)
    with pytest.raises(ValueError, match=r"config\.hidden_dropout_prob must be 0\.0, got 0\.1"):
        ASTForAudioClassification(config)
    with pytest.raises(ValueError, match="is not a folder: download"):
        ASTForAudioClassification.from_pretrained("MIT/ast-finetuned-audioset")
    transformers.ViTConfig().save_pretrained(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(KeyError, match="audio_spectrogram_transformer"):
        ASTForAudioClassification.from_pretrained(tmp_path)

"""The feature extractor against what transformers' computes, from torchaudio's filterbank."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastast import Spectrograms
from fastast.compat import ASTFeatureExtractor

torchaudio_kaldi = pytest.importorskip("torchaudio.compliance.kaldi")

RATE = 16000
MEAN, STD = -4.2677393, 4.5689974


def clip(length: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(length).standard_normal(length)).astype(np.float32)


def expected(waveform, max_length=1024, num_mels=128, rate=RATE, mean=MEAN, std=STD):
    frames = torchaudio_kaldi.fbank(
        torch.from_numpy(waveform)[None],
        sample_frequency=rate,
        window_type="hanning",
        num_mel_bins=num_mels,
    )[:max_length]
    return (F.pad(frames, (0, 0, 0, max_length - len(frames))) - mean) / (std * 2)


LENGTHS = [16000, 400, 170000, 5555]


def test_equals_transformers():
    clips = [clip(length) for length in LENGTHS]
    truth = torch.stack([expected(waveform) for waveform in clips])
    features = ASTFeatureExtractor()(clips, sampling_rate=RATE, return_tensors="pt")
    assert list(features) == ["input_values"] and features.input_values.shape == (4, 1024, 128)
    torch.testing.assert_close(features["input_values"], truth, rtol=0, atol=2e-3)
    # Padding is a number, not a rounding.
    assert (features.input_values[0, 98:] - (0 - MEAN) / (2 * STD)).abs().max() < 1e-6


FORMS = {
    "array": lambda x: x[0],
    "float64 array": lambda x: x[0].astype(np.float64),
    "view": lambda x: np.ascontiguousarray(x[0][::-1])[::-1],
    "numbers": lambda x: x[0].tolist(),
    "tuple": lambda x: tuple(x[0].tolist()),
    "tensor": lambda x: torch.from_numpy(x[0]),
    "arrays": lambda x: x,
    "lists": lambda x: [clip.tolist() for clip in x],
    "tensors": lambda x: [torch.from_numpy(clip) for clip in x],
    "2-D array": lambda x: np.stack(x),
    "2-D tensor": lambda x: torch.from_numpy(np.stack(x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_input(form):
    extractor = ASTFeatureExtractor(max_length=50)
    clips = [clip(8000), clip(8000) + 0.01]
    found = extractor(FORMS[form](clips), sampling_rate=RATE, return_tensors="pt").input_values
    truth = torch.stack([expected(waveform, 50) for waveform in clips])[: len(found)]
    assert len(found) == (2 if form in ("arrays", "lists", "tensors", *list(FORMS)[-2:]) else 1)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-3)


def test_forms_of_output():
    extractor, clips = ASTFeatureExtractor(max_length=64), [clip(3000), clip(20000)]
    tensor = extractor(clips, RATE, "pt").input_values
    array = extractor(clips, RATE, "np").input_values
    listed = extractor(clips, RATE).input_values
    assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())
    assert isinstance(listed, list) and np.array_equal(np.stack(listed), array)
    moved = extractor(clips, RATE, "pt").to("meta")
    assert moved.input_values.device.type == "meta"
    with pytest.raises(AttributeError):
        _ = moved.attention_mask


def test_ragged_output_is_whole_clips():
    extractor = ASTFeatureExtractor(max_length=64)
    lengths = [3000, 100, 20000]
    ragged = extractor([clip(n) for n in lengths], RATE, "ragged").input_values
    assert isinstance(ragged, Spectrograms)
    assert ragged.segments.lengths.tolist() == [17, 0, 123]
    for found, length in zip(ragged.unpack(), lengths, strict=True):
        if len(found):
            truth = expected(clip(length), len(found))
            torch.testing.assert_close(found, truth, rtol=0, atol=2e-3)


def test_settings():
    extractor = ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=40, max_length=30, mean=1.0)
    truth = expected(clip(2000), 30, 40, 8000, 1.0)
    found = extractor(clip(2000), sampling_rate=8000, return_tensors="pt").input_values[0]
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-3)


def test_attributes_may_change():
    extractor = ASTFeatureExtractor(max_length=40)
    extractor.do_normalize = False
    raw = extractor(clip(8000), RATE, "pt").input_values
    extractor.max_length = 60
    longer = extractor(clip(8000), RATE, "pt").input_values
    assert torch.equal(longer[:, :40], raw) and not longer[0, 48:].any()
    extractor.max_length, extractor.do_normalize = 40, True
    extractor.mean, extractor.std = -9.0, 3.0
    torch.testing.assert_close(extractor(clip(8000), RATE, "pt").input_values, (raw + 9) / 6)


def test_settings_of_a_checkpoint():
    config = json.loads(
        '{"do_normalize": true, "feature_extractor_type": "ASTFeatureExtractor",'
        ' "feature_size": 1, "max_length": 128, "mean": -6.845978, "num_mel_bins": 128,'
        ' "padding_side": "right", "padding_value": 0.0, "return_attention_mask": false,'
        ' "sampling_rate": 16000, "std": 5.5654526}'
    )
    extractor = ASTFeatureExtractor(**config)
    for name, value in config.items():
        assert getattr(extractor, name) == value
    truth = expected(clip(9000), 128, mean=-6.845978, std=5.5654526)
    found = extractor(clip(9000), sampling_rate=16000, return_tensors="pt", padding="max_length")
    torch.testing.assert_close(found.input_values[0], truth, rtol=0, atol=2e-3)


def test_clips_shorter_than_a_frame_are_padding():
    found = ASTFeatureExtractor()([clip(399), clip(0)], RATE, "pt").input_values
    torch.testing.assert_close(found, torch.full_like(found, (0 - MEAN) / (2 * STD)))


def test_gradient():
    waveform = torch.from_numpy(clip(4000)).requires_grad_()
    ASTFeatureExtractor()(waveform, RATE, "pt").input_values.sum().backward()
    assert waveform.grad.isfinite().all() and waveform.grad.any()


def test_errors():
    extractor = ASTFeatureExtractor()
    for call, message in (
        (lambda: extractor(clip(500), 44100), "features are of 16000 Hz; resample"),
        (lambda: extractor([], RATE), "raw_speech is empty"),
        (lambda: extractor(clip(500), RATE, "tf"), "return_tensors must be one of"),
        (lambda: extractor(np.zeros((2, 3, 400), np.float32), RATE), "must be mono"),
        (lambda: extractor([np.zeros((1, 400), np.float32)], RATE), "must be mono"),
        (lambda: extractor(np.zeros(400, np.int16), RATE), "divide 16-bit samples by 32768"),
        (lambda: extractor(torch.zeros(400, dtype=torch.int16), RATE), "divide 16-bit samples"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.warns(UserWarning, match="pass sampling_rate"):
        extractor(clip(500))

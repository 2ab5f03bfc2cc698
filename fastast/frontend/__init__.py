"""From waveforms to model input: spectrograms and augmentation, on the device that trains."""

from fastast.frontend.mel_frontend import MelFrontend, pad_or_cut
from fastast.frontend.spectrogram import add_noise, roll_frames, spec_augment
from fastast.frontend.waveform import circular_roll, gain_jitter, mix_waveforms

__all__ = [
    "MelFrontend",
    "add_noise",
    "circular_roll",
    "gain_jitter",
    "mix_waveforms",
    "pad_or_cut",
    "roll_frames",
    "spec_augment",
]

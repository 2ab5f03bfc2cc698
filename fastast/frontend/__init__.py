"""From waveforms to model input: spectrograms and augmentation, on the device that trains."""

from fastast.frontend.augment import gain_jitter, spec_augment
from fastast.frontend.mel_frontend import MelFrontend, pad_or_cut

__all__ = ["MelFrontend", "gain_jitter", "pad_or_cut", "spec_augment"]

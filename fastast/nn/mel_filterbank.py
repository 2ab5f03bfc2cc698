"""Log-mel filterbanks as a module: waveforms in, spectrograms out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastast.ops._library import check_choice
from fastast.ops.mel_filterbank import dense_mel_filterbank, mel_filterbank
from fastast.ops.mel_plan import MelPlan, frame_segments, hop_from_ms
from fastast.segments import Segments, Spectrograms


class MelFilterbank(nn.Module):
    """Log-mel frames of waveforms on the waveforms' device; see :mod:`fastast.ops.mel_filterbank`.

    The defaults are the front end of AST. The module has no parameters and nothing in its state
    dict; its tables follow ``.to(device)`` and stay float32 under ``.half()`` or ``.bfloat16()``,
    and it computes in float32 under autocast. A gradient flows to waveforms that require one, at
    the price of a slower computation.

    Args:
        sample_rate: of the waveforms, in Hz. There is no resampling. Default: the preset's,
            16000 for ``"kaldi"``.
        num_mels: mel bins. Default: the preset's, 128 for ``"kaldi"``.
        preset: which front end: ``"kaldi"``, ``"htsat"`` or ``"epic_sounds"``.
        frame_shift_ms: from a frame to the next, where a call does not say otherwise. Default:
            10, and 5 for ``"epic_sounds"``.
        dtype: of the spectrograms: float32, or bfloat16, to which they are rounded.
        settings: of the preset; see :meth:`MelPlan.kaldi <fastast.ops.MelPlan.kaldi>`, ``htsat``
            and ``epic_sounds``. All have ``low_freq``, ``high_freq``, and AST's normalisation
            ``(x - mean) / (2 std)`` with ``mean`` and ``std``.

    Raises:
        ValueError: settings that contradict each other.
        TypeError: settings that the preset does not have.
    """

    def __init__(
        self,
        sample_rate: float | None = None,
        num_mels: int | None = None,
        *,
        preset: str = "kaldi",
        frame_shift_ms: float | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, tuple(MelPlan.PRESETS))
        given = {"sample_rate": sample_rate, "num_mels": num_mels}
        settings |= {name: value for name, value in given.items() if value is not None}
        self._plan = getattr(MelPlan, preset)(**settings)
        shift = MelPlan.PRESETS[preset] if frame_shift_ms is None else frame_shift_ms
        self.frame_shift = hop_from_ms(shift, self._plan.sample_rate)
        self.dtype = dtype
        for name in MelPlan.TABLES:
            self.register_buffer(name, getattr(self._plan, name), persistent=False)

    @property
    def plan(self) -> MelPlan:
        """The settings, with the tables where the module is.

        ``plan.normalized(0.0)`` is the ``fill`` that SpecAugment needs after this module.
        """
        return replace(self._plan, **{name: getattr(self, name) for name in MelPlan.TABLES})

    def forward(
        self,
        waveforms: Tensor | Sequence[Tensor],
        sample_offsets: Tensor | None = None,
        frame_shift: Tensor | Sequence[int] | int | None = None,
        frames: Segments | None = None,
        num_rows: int | None = None,
        dither_keys: Tensor | None = None,
    ) -> Spectrograms | Tensor:
        """Waveforms in one of three forms to frames.

        Args:
            waveforms: int16, or floating point in [-1, 1]:

                - ``[samples]``, clips end to end, with ``sample_offsets``;
                - a list of clips ``[L_i]`` of one dtype and device;
                - ``[B, L]``, clips of one length.
            sample_offsets: int64 ``[S + 1]``, where each clip begins; first form only.
            frame_shift: in samples, of all clips or of each (not in the third form). Default:
                the module's.
            frames: first form only: the stream that comes out, from
                :func:`fastast.ops.frame_segments`. A data loader makes it; without it, it is
                made here, which needs ``sample_offsets`` and ``frame_shift`` on the CPU.
            num_rows: first form only: rows of the stream, where ``frames`` has a budget.
            dither_keys: of each clip, from :func:`fastast.ops.mel_filterbank.dither_keys`. If the
                settings have ``dither``, training mode needs them; in evaluation mode there is no
                noise without them.

        Returns:
            ``Spectrograms`` for the first two forms, ``[B, T, num_mels]`` for the third.

        Raises:
            ValueError: arguments that do not fit together; see
                :func:`fastast.ops.mel_filterbank`.
        """
        frame_shift = self.frame_shift if frame_shift is None else frame_shift
        plan = self.plan
        if dither_keys is None and not self.training:
            plan = replace(plan, dither=0.0)
        packed = isinstance(waveforms, Tensor) and waveforms.ndim == 1
        if not packed and (sample_offsets is not None or frames is not None):
            raise ValueError(
                "sample_offsets and frames describe a flat [samples] tensor of clips end to end; "
                "leave them out for a list or a [clips, samples] tensor"
            )
        if packed:
            return self._packed(
                plan, waveforms, sample_offsets, frame_shift, frames, num_rows, dither_keys
            )
        if not isinstance(waveforms, Tensor):
            return self._packed(plan, *_pack(waveforms), frame_shift, None, None, dither_keys)
        if not isinstance(frame_shift, int):
            raise ValueError(
                "frame_shift must be one number for a [clips, samples] tensor; pass a list of "
                "clips to give each its own"
            )
        return dense_mel_filterbank(
            waveforms, frame_shift, plan, dither_keys=dither_keys, dtype=self.dtype
        )

    def _packed(
        self,
        plan: MelPlan,
        waveforms: Tensor,
        sample_offsets: Tensor | None,
        frame_shift: Tensor | Sequence[int] | int,
        frames: Segments | None,
        num_rows: int | None,
        dither_keys: Tensor | None,
    ) -> Spectrograms:
        if sample_offsets is None:
            raise ValueError(
                "sample_offsets is missing: a flat waveform needs it to tell its clips apart; "
                "for a single clip, pass waveforms[None]"
            )
        device = waveforms.device
        if isinstance(frame_shift, int):
            shape = (sample_offsets.shape[0] - 1,)
            frame_shift = sample_offsets.new_full(shape, frame_shift, dtype=torch.int32)
        frame_shift = torch.as_tensor(frame_shift, dtype=torch.int32)
        if frames is None:
            for name, table in (("sample_offsets", sample_offsets), ("frame_shift", frame_shift)):
                if table.device.type != "cpu":
                    raise ValueError(
                        f"{name} is on {table.device}, and reading it back would wait for the "
                        "device; pass it on the CPU, or pass frames from frame_segments"
                    )
            lengths = sample_offsets.diff().numpy()
            frames = frame_segments(lengths, frame_shift.numpy(), plan).to(device)
        rows = mel_filterbank(
            waveforms,
            sample_offsets.to(device, non_blocking=True),
            frame_shift.to(device, non_blocking=True),
            frames,
            plan,
            num_rows,
            dither_keys=dither_keys,
            dtype=self.dtype,
        )
        return Spectrograms(rows, frames)

    def _apply(self, fn: Callable, recurse: bool = True) -> MelFilterbank:
        super()._apply(fn, recurse)
        # Casting the module must not round the tables, so only their new device is taken over.
        plan = self._plan.to(self.window.device)
        for name in MelPlan.TABLES:
            setattr(self, name, getattr(plan, name))
        return self

    def extra_repr(self) -> str:
        plan = self._plan
        return (
            f"sample_rate={plan.sample_rate}, num_mels={plan.num_mels}, "
            f"window_length={plan.window_length}, frame_shift={self.frame_shift}, "
            f"mean={plan.mean}, std={plan.std}"
        )


def _pack(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips end to end, and their offsets on the CPU."""
    if len(clips) == 0:
        raise ValueError("waveforms is empty: pass at least one clip")
    shapes = [tuple(clip.shape) for clip in clips]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"waveforms must be 1-D clips (one channel), got shapes {shapes}")
    kinds = {(clip.dtype, clip.device) for clip in clips}
    if len(kinds) > 1:
        raise ValueError(
            f"waveforms must be of one dtype and device, got {sorted(map(str, kinds))}"
        )
    offsets = torch.tensor([0] + [shape[0] for shape in shapes]).cumsum(0)
    return torch.cat(list(clips)), offsets

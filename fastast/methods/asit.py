r"""ASiT's pre-training: what a teacher makes of whole spectrograms, seen through corrupted ones.

Atito et al., "ASiT: Audio Spectrogram vIsion Transformer for General Audio Representation",
sections 3.1 to 3.3. Two views of each clip are corrupted (:class:`~fastast.tokens.GMML`). From the
corrupted view :math:`\hat x` the student is to restore the pixels that were replaced; to assign to
each patch the class that the teacher assigns to it in the whole view :math:`x`; and to assign to
the view the class that the teacher assigns to the *other* view :math:`x'`. With the pixels
:math:`M` and the patches :math:`T` that were replaced,

.. math::
    \mathcal{L}_\text{recons} = \frac{1}{|M|} \sum_{m \in M} |x_m - \bar x_m|, \qquad
    \mathcal{L}_\text{lcl} = \frac{1}{|T|} \sum_{i \in T} H(t_i(x), s_i(\hat x)), \qquad
    \mathcal{L}_\text{gcl} = H(t(x'), s(\hat x))

(equations 1, 5 and section 3.2), :math:`H` being the cross-entropy between a softmax of the
teacher's logits, centred and sharpened, and one of the student's (equations 3 and 4,
:mod:`fastast.ops.distillation`). The loss is their sum, and each view counts alike, whatever its
length.

After each step the centres move towards the mean of the teacher's logits, and the teacher
:math:`\phi` towards the student :math:`\theta`:

.. math::
    c \leftarrow m_c c + (1 - m_c) \frac{1}{n} \sum_{i=1}^{n} t_i, \qquad
    \phi \leftarrow \lambda \phi + (1 - \lambda) \theta

with :math:`\lambda` on a half cosine over the run.

The published code differs from the paper, each time an option here: all patches count for the local
loss (``local_tokens="all"``), the reconstruction counts twice (``reconstruction_weight=2``), and
the teacher's temperature rises over the first epochs (``teacher_temp_epochs=30``). It takes the
mean over the replaced pixels of all views together.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastast.methods.shares import clip_shares, row_shares
from fastast.ops import distillation_cross_entropy
from fastast.random import purpose_key, random_bits
from fastast.schedules import cosine
from fastast.segments import Segments, Spectrograms
from fastast.tokens import GMML, PatchGrid
from fastast.tokens.gmml import Corrupted, another_clip

if TYPE_CHECKING:
    from fastast.data import Batch
    from fastast.models import ASiTPretraining
    from fastast.models.asit import Assigned

_PARTNER = purpose_key("asit alien")


class Encoded(NamedTuple):
    """What :meth:`MaskedDistillation.encode` makes of both views of each clip.

    Attributes:
        student: what it assigned to the corrupted views.
        teacher: what it assigned to the whole ones.
        errors: ``[rows]``, of each patch, absolute errors summed over its replaced pixels; zero on
            other rows.
        replaced: int64 ``[rows]``, how many those pixels are.
    """

    student: Assigned
    teacher: Assigned
    errors: Tensor
    replaced: Tensor


class MaskedDistillation(nn.Module):
    """A student, its teacher, and how far apart they are.

    Segments ``2 i`` and ``2 i + 1`` of a batch are two views of one clip, of any lengths and frame
    shifts. Each has a ``clip_id`` of its own, which its augmentation and corruption follow from.

    Args:
        model: the student. The teacher begins as a copy of it, and has no gradient.
        frontend: turns a batch's waveforms into spectrograms; it augments in training mode.
        corruption: of what the student sees. Blocks that come from another clip are of its view
            that has the same number; it is drawn from those of the batch.
        reconstruction_weight, local_weight, global_weight: of the three losses in their sum.
        local_tokens: patches that the local loss counts: the ``"corrupted"`` ones, of which any
            pixel was replaced (equation 5), or ``"all"`` (the code).
        student_temp: of the student's softmax.
        teacher_temp: of the teacher's; lower is sharper.
        first_teacher_temp: the teacher's in the first epoch, if it rises.
        teacher_temp_epochs: epochs until it is ``teacher_temp``, in equal steps; 1 is from the
            beginning. Validation is always at ``teacher_temp``.
        momentum, momentum_end: of the teacher, at the beginning and at the end of the run.
        center_momentum: of the centres.
        seed: of the corruption, which also depends on view and epoch. Validation is corrupted alike
            in every epoch, since its batches are of epoch 0.

    Attributes:
        model: the student.
        teacher: the teacher, always in evaluation mode; the model to fine-tune.
        local_center, global_center: ``[classes]``, subtracted from the teacher's logits.

    The loss is the sum over the views of the batch, divided by ``batch.loss_denominator``: their
    number, unless a step has several batches. Labels are not looked at.

    Raises:
        ValueError: an unknown ``local_tokens``, or a number out of range.
    """

    def __init__(
        self,
        model: ASiTPretraining,
        frontend: nn.Module,
        corruption: GMML,
        *,
        reconstruction_weight: float = 1.0,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        local_tokens: Literal["corrupted", "all"] = "corrupted",
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        first_teacher_temp: float = 0.04,
        teacher_temp_epochs: int = 1,
        momentum: float = 0.996,
        momentum_end: float = 1.0,
        center_momentum: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if local_tokens not in ("corrupted", "all"):
            raise ValueError(f"local_tokens must be 'corrupted' or 'all', got {local_tokens!r}")
        for name, value in (
            ("reconstruction_weight", reconstruction_weight),
            ("local_weight", local_weight),
            ("global_weight", global_weight),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name, value in (
            ("student_temp", student_temp),
            ("teacher_temp", teacher_temp),
            ("first_teacher_temp", first_teacher_temp),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in (
            ("momentum", momentum),
            ("momentum_end", momentum_end),
            ("center_momentum", center_momentum),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if teacher_temp_epochs < 1:
            raise ValueError(f"teacher_temp_epochs must be at least 1, got {teacher_temp_epochs}")
        self.model = model
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.frontend = frontend
        self.corruption = corruption
        self.reconstruction_weight = reconstruction_weight
        self.local_weight = local_weight
        self.global_weight = global_weight
        self.local_tokens = local_tokens
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.first_teacher_temp = first_teacher_temp
        self.teacher_temp_epochs = teacher_temp_epochs
        self.momentum = momentum
        self.momentum_end = momentum_end
        self.center_momentum = center_momentum
        self.seed = seed
        for name in ("local", "global"):
            classes = getattr(model, f"{name}_classes").weight
            self.register_buffer(f"{name}_center", classes.new_zeros(len(classes)))

    def train(self, mode: bool = True) -> MaskedDistillation:
        """The student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and its parts ``reconstruction``, ``local`` and ``global``: scalars, each the
        mean over the views.

        In training mode also ``centering``, for :meth:`after_step`. In evaluation mode also what
        shows whether the teacher collapses, :meth:`monitor`.
        """
        clean, grid = self.frontend(batch), batch.grid
        if not isinstance(clean, Spectrograms):
            raise ValueError(
                "views must be of native length: leave fixed_seconds out, and give batches no "
                "dense_frames"
            )
        temp = self._teacher_temp(batch.epoch) if self.training else self.teacher_temp
        encoded = self.encode(clean, self.corrupt(clean, batch), grid)
        local, global_ = self.divergence(encoded, temp)
        patches = grid.segments.row_mask(grid.num_rows) & (grid.prefix_id < 0)
        counted = patches if self.local_tokens == "all" else encoded.replaced > 0
        parts = {
            "reconstruction": (encoded.errors * row_shares(batch, encoded.replaced)).sum(),
            "local": (local * row_shares(batch, counted)).sum(),
            "global": (global_ * clip_shares(batch)).sum(),
        }
        loss = sum(getattr(self, f"{name}_weight") * part for name, part in parts.items())
        out = {"loss": loss} | {name: part.detach() for name, part in parts.items()}
        views = batch.clip_ids >= 0
        if self.training:
            return out | {"centering": centering(encoded.teacher, patches, views)}
        return out | self.monitor(encoded.teacher, patches, views)

    def corrupt(self, clean: Spectrograms, batch: Batch) -> Corrupted:
        """What the student sees of a batch.

        Raises:
            ValueError: an odd number of segments, which cannot be pairs of views.
        """
        if clean.segments.num_segments % 2:
            raise ValueError(
                f"the batch has {clean.segments.num_segments} segments: segments 2 i and 2 i + 1 "
                "must be two views of one clip"
            )
        keys = {"seed": self.seed, "epoch": batch.epoch}
        bits = random_bits(**keys, clips=batch.clip_ids, purpose=_PARTNER, draws=1)
        partner = _alien_views(clean.segments, bits.view(-1, 2))
        return self.corruption(clean, batch.clip_ids, partner=partner, **keys)

    def encode(self, clean: Spectrograms, corrupted: Corrupted, grid: PatchGrid) -> Encoded:
        """Runs the teacher on the whole views and the student on the corrupted ones.

        Args:
            clean: both views of each clip.
            corrupted: the same as the student sees them.
            grid: of the tokens.
        """
        with torch.no_grad():
            teacher = self.teacher(clean, grid)
            target = self.model.patch_embed.cut(clean.frames, grid)
            replaced = self.model.patch_embed.cut(corrupted.mask.to(target.dtype), grid)
        features, _ = self.model.forward_features(corrupted.spectrograms, grid)
        restored = self.model.decoder(features).to(target.dtype)
        errors = ((restored - target).abs() * replaced).sum(1)
        return Encoded(self.model.assign(features, grid), teacher, errors, replaced.sum(1).long())

    def divergence(self, encoded: Encoded, teacher_temp: float | Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies between teacher and student: of each patch, ``[rows]``, in the same view,
        and of each view, ``[segments]``, in the other one.

        On class tokens and dead rows, and of empty segments, they mean nothing.
        """
        student, teacher = encoded.student, encoded.teacher
        temps = self.student_temp, teacher_temp
        local = distillation_cross_entropy(
            student.local_logits, teacher.local_logits, self.local_center, *temps
        )
        other = teacher.global_logits.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        global_ = distillation_cross_entropy(
            student.global_logits, other, self.global_center, *temps
        )
        return local, global_

    def monitor(self, teacher: Assigned, patches: Tensor, views: Tensor) -> dict[str, Tensor]:
        """What shows whether the teacher still tells things apart; scalars in [0, 1].

        ``local_entropy`` and ``global_entropy`` are those of its mean output, over the logarithm of
        the number of classes: 0 where everything is one class, 1 where all classes are used alike
        or nothing is told apart. ``local_spread`` and ``global_spread`` are the mean squared
        distances of the vectors before the classes from their mean: 0 where all are the same.

        Args:
            teacher: its output.
            patches: bool ``[rows]``, those that hold a patch.
            views: bool ``[segments]``, those that hold a view.
        """
        found = {}
        for name, used in (("local", patches), ("global", views)):
            logits = getattr(teacher, f"{name}_logits").float()
            weight = used / used.sum().clamp(min=1)
            logits = (logits - getattr(self, f"{name}_center")) / self.teacher_temp
            mean = (logits.softmax(1) * weight[:, None]).sum(0)
            found[f"{name}_entropy"] = -torch.special.xlogy(mean, mean).sum() / math.log(len(mean))
            center = (getattr(teacher, f"{name}_vectors") * weight[:, None]).sum(0)
            found[f"{name}_spread"] = (1 - center.square().sum()).clamp(min=0)
        return found

    @torch.no_grad()
    def after_step(self, centering: Tensor, *, done: float) -> None:
        """Moves centres and teacher on. To be called once, after each step of the optimiser.

        Args:
            centering: of :meth:`forward`, summed over the batches and the processes of the step.
            done: share of the run before the step, in [0, 1].
        """
        sizes = [len(self.local_center), len(self.global_center), 1, 1]
        *sums, patches, views = centering.split(sizes)
        for center, total, count in (
            (self.local_center, sums[0], patches),
            (self.global_center, sums[1], views),
        ):
            share = (1 - self.center_momentum) * (count > 0)
            center += share * (total / count.clamp(min=1) - center)
        momentum = cosine(self.momentum, self.momentum_end, done)
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.model.parameters()), 1 - momentum
        )

    def restart_teacher(self) -> None:
        """Makes the teacher what the model is, and forgets the centres."""
        self.teacher.load_state_dict(self.model.state_dict())
        self.local_center.zero_()
        self.global_center.zero_()

    def flops(self, batch: Batch) -> int:
        """Of a training step on a batch, filterbank and optimiser apart; see
        :mod:`fastast.models.flops`."""
        tokens = batch.grid.segments.host_offsets.diff().numpy()
        model = self.model
        compared = model.encoding_flops(tokens) + model.assigning_flops(tokens)
        return (compared + model.decoder_flops(tokens)).training + compared.forward

    def _teacher_temp(self, epoch: Tensor) -> float | Tensor:
        """The teacher's temperature in an epoch."""
        if self.teacher_temp_epochs == 1:
            return self.teacher_temp
        share = (epoch / (self.teacher_temp_epochs - 1)).clamp(max=1)
        return self.first_teacher_temp + (self.teacher_temp - self.first_teacher_temp) * share


@torch.no_grad()
def centering(teacher: Assigned, patches: Tensor, views: Tensor) -> Tensor:
    """Sums of the teacher's logits over patches and over views, and how many of each there are."""
    sums, counts = [], []
    for logits, used in ((teacher.local_logits, patches), (teacher.global_logits, views)):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums.append(torch.where(used[:, None], logits, 0).sum(0, dtype=dtype))
        counts.append(used.sum()[None].to(dtype))
    return torch.cat(sums + counts)


def _alien_views(segments: Segments, bits: Tensor) -> Tensor:
    """For each view, the view of the same number of another clip: int64 ``[segments]``."""
    lengths = segments.lengths.view(-1, 2)
    clips = [another_clip(lengths[:, view], bits[:, view]) for view in (0, 1)]
    return torch.stack([2 * clip + view for view, clip in enumerate(clips)], 1).flatten()

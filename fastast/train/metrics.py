"""How well logits order and name the clips: accuracy, mAP, mAUC and d', also class by class.

- *Accuracy*, for data with one class per clip alone: the share of clips whose highest logit is
  their class's. (AST's code prints the same for multi-label data, as if the first label were the
  only one; here it is left out.)
- *AP* of a class: the precision at each of its clips, averaged, when all clips are ordered by the
  class's logit; clips of equal logits count as one step. *mAP* is the mean over the classes.
- *AUC* of a class: the chance that a clip of the class has a higher logit than one that is not of
  it, ties counting one half. *mAUC* is the mean over the classes.
- *d'* = sqrt(2) * Phi^-1(mAUC), as AST's code has it: how many standard deviations apart the two
  logits would lie, were they normal.

A class that no clip has takes no part in mAP, and neither it nor one that all clips have in mAUC.
What is undefined is None, which JSON can hold, and never NaN: mAP without any such class, d' of a
perfect mAUC, and everything if a logit is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassScore:
    """Of one class; None is undefined.

    Attributes:
        positives: clips that have the class.
        ap: average precision.
        auc: area under the receiver operating characteristic.
        recall: share of the positives whose highest logit is this class's; None in multi-label
            data.
    """

    positives: int
    ap: float | None
    auc: float | None
    recall: float | None


def measure(logits: Tensor, targets: Tensor) -> tuple[dict[str, float | None], list[ClassScore]]:
    """Scores over all classes, and those of each class.

    Args:
        logits: ``[clips, classes]``; anything that orders clips, such as probabilities, does.
        targets: class indices, int64 ``[clips]``, or 0 and 1, ``[clips, classes]``.

    Returns:
        ``{"accuracy", "mAP", "mAUC", "d_prime"}``, without the first for multi-label targets, and
        one :class:`ClassScore` per class.

    Raises:
        ValueError: shapes that do not fit, or targets that are not classes.
    """
    _check(logits, targets)
    single = targets.ndim == 1
    classes = torch.arange(logits.shape[1], device=targets.device)
    positive = targets[:, None] == classes if single else targets.bool()
    if logits.isnan().any():
        names = ("accuracy", "mAP", "mAUC", "d_prime")[not single :]
        counts = positive.sum(0).tolist()
        return dict.fromkeys(names), [ClassScore(count, None, None, None) for count in counts]

    best = logits.argmax(1)
    scores = [
        _class_score(logits[:, index], positive[:, index], best == index if single else None)
        for index in range(len(classes))
    ]
    mauc = _mean([score.auc for score in scores])
    metrics = {"accuracy": (best == targets).double().mean().item()} if single else {}
    metrics |= {
        "mAP": _mean([score.ap for score in scores]),
        "mAUC": mauc,
        "d_prime": None if mauc is None else d_prime(mauc),
    }
    return metrics, scores


def headline(names: Container[str]) -> str:
    """The metric to look at first: accuracy where there is one, mAP of multi-label data."""
    return "accuracy" if "accuracy" in names else "mAP"


def d_prime(auc: float) -> float | None:
    """``sqrt(2) * Phi^-1(auc)``; None where that is infinite."""
    value = math.sqrt(2) * torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)).item()
    return value if math.isfinite(value) else None


def _class_score(logits: Tensor, positive: Tensor, hit: Tensor | None) -> ClassScore:
    # Imported here, because it takes a second.
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    # torchmetrics passes whatever lies outside [0, 1] through a sigmoid, in float32: large logits
    # would become ties. Both scores depend on the order alone, which ranks keep.
    ranks = logits.unique(return_inverse=True)[1].double() / len(logits)
    count = int(positive.sum())
    ap = auc = recall = None
    if count:
        ap = binary_average_precision(ranks, positive.long(), validate_args=False).item()
        if hit is not None:
            recall = (hit & positive).sum().item() / count
    if 0 < count < len(positive):
        auc = binary_auroc(ranks, positive.long(), validate_args=False).item()
    return ClassScore(count, ap, auc, recall)


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            f"logits must be [clips, classes] of at least one each, got {tuple(logits.shape)}"
        )
    shape = tuple(logits.shape)
    if tuple(targets.shape) not in (shape, shape[:1]):
        raise ValueError(
            f"targets must be [clips] or [clips, classes], got {tuple(targets.shape)} for logits "
            f"of shape {shape}"
        )
    if targets.ndim == 2:
        bad = (targets != 0) & (targets != 1)
        expected = "0 or 1 (mixed clips cannot be scored)"
    else:
        bad = (targets < 0) | (targets >= shape[1])
        expected = f"in [0, {shape[1]}) (unlabelled clips cannot be scored)"
    if bad.any():
        raise ValueError(f"targets must be {expected}, got {targets[bad][0].item()}")

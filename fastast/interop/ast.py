"""AST's published weights (YuanGongND/ast, BSD-3-Clause)."""

from __future__ import annotations

from torch import Tensor

from fastast.interop.grid_vit import classifier, to_classifier
from fastast.models import AST


def from_state_dict(weights: dict[str, Tensor], config: dict) -> AST:
    """Converts ``v.*`` and ``mlp_head.*``; the unused ImageNet heads are left out.

    ``config``: ``stride`` (default 10 both ways) and ``num_mels`` (default 128). The input length
    follows from the position table: the shortest that gives its number of columns, unless
    ``input_frames`` says otherwise.
    """
    return classifier(AST, weights, config.get("stride", (10, 10)), config)


def to_state_dict(model: AST) -> dict[str, Tensor]:
    """The inverse; the unused ImageNet heads are not there."""
    return to_classifier(model)

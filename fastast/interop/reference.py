"""Published weights, family by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fastast.interop import asit, ast, elastic_ast, flexi_ast, hts_at, ssast

_CONVERTERS: dict[str, Callable[[dict[str, Tensor], dict], nn.Module]] = {
    "asit": asit.from_state_dict,
    "ast": ast.from_state_dict,
    "elastic_ast": elastic_ast.from_state_dict,
    "flexi_ast": flexi_ast.from_state_dict,
    "hts_at": hts_at.from_state_dict,
    "ssast": ssast.from_state_dict,
}


def from_reference(
    state_dict: Mapping[str, Tensor], family: str, config: Mapping | None = None
) -> nn.Module:
    """Builds the model whose outputs equal the original's.

    Args:
        state_dict: as published; a leading ``module.`` of each key is ignored.
        family: ``"ast"`` (YuanGongND/ast), ``"ssast"`` (YuanGongND/ssast), ``"elastic_ast"``
            (JiuFengSC/ElasticAST), ``"flexi_ast"`` (JiuFengSC/FlexiAST_INTERSPEECH23),
            ``"asit"`` (Sara-Ahmed/ASiT) or ``"hts_at"`` (RetroCirce/HTS-Audio-Transformer).
        config: what the keys cannot say, as the family's converter documents.

    Returns:
        The model in evaluation mode, in the dtype of the weights.

    Raises:
        ValueError: an unknown family, or weights that do not have the family's keys and shapes.
    """
    if family not in _CONVERTERS:
        raise ValueError(f"family must be one of {tuple(_CONVERTERS)}, got {family!r}")
    weights = {key.removeprefix("module."): value for key, value in state_dict.items()}
    try:
        return _CONVERTERS[family](weights, dict(config or {})).eval()
    except KeyError as error:
        raise ValueError(f"the state dict has no {error}: is it of the {family} family?") from error
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the state dict does not fit the {family} family: {error}") from error

"""Published weights, family by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fastast.interop import (
    asit,
    ast,
    audio_mae,
    elastic_ast,
    flexi_ast,
    hts_at,
    ssast,
    transformers,
    vit,
)
from fastast.models import (
    AST,
    HTSAT,
    SSAST,
    ASiTPretraining,
    AudioMAE,
    AudioMAEPretraining,
    ElasticAST,
    FlexiAST,
    SSASTPretraining,
)

_CONVERTERS: dict[str, Callable[[dict[str, Tensor], dict], nn.Module]] = {
    "asit": asit.from_state_dict,
    "ast": ast.from_state_dict,
    "audio_mae": audio_mae.from_state_dict,
    "elastic_ast": elastic_ast.from_state_dict,
    "flexi_ast": flexi_ast.from_state_dict,
    "hts_at": hts_at.from_state_dict,
    "ssast": ssast.from_state_dict,
    "transformers": transformers.from_state_dict,
    "vit": vit.from_state_dict,
}
_INVERSES: dict[type[nn.Module], tuple[str, Callable[[nn.Module], dict[str, Tensor]]]] = {
    AST: ("ast", ast.to_state_dict),
    ASiTPretraining: ("asit", asit.to_state_dict),
    AudioMAE: ("audio_mae", audio_mae.to_state_dict),
    AudioMAEPretraining: ("audio_mae", audio_mae.to_state_dict),
    ElasticAST: ("elastic_ast", elastic_ast.to_state_dict),
    FlexiAST: ("flexi_ast", flexi_ast.to_state_dict),
    HTSAT: ("hts_at", hts_at.to_state_dict),
    SSAST: ("ssast", ssast.to_state_dict),
    SSASTPretraining: ("ssast", ssast.to_state_dict),
}


def from_reference(
    state_dict: Mapping[str, Tensor], family: str, config: Mapping | None = None
) -> nn.Module:
    """Builds the model whose outputs equal the original's.

    Args:
        state_dict: as published; a leading ``module.`` of each key is ignored.
        family: ``"ast"`` (YuanGongND/ast), ``"ssast"`` (YuanGongND/ssast), ``"elastic_ast"``
            (JiuFengSC/ElasticAST), ``"flexi_ast"`` (JiuFengSC/FlexiAST_INTERSPEECH23),
            ``"audio_mae"`` (facebookresearch/AudioMAE), ``"asit"`` (Sara-Ahmed/ASiT),
            ``"hts_at"`` (RetroCirce/HTS-Audio-Transformer), ``"transformers"`` (Hugging Face's
            AST), or, of images and without a classifier, ``"vit"`` (timm's ViT and DeiT).
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


def to_reference(model: nn.Module, family: str | None = None) -> dict[str, Tensor]:
    """The weights of a model with the keys and shapes of the original, for its own code to load.

    What the original has and does not use (ImageNet heads), or makes anew from sizes (window
    indices, filterbanks), is not there: load with ``strict=False``.

    Args:
        model: of :func:`from_reference` or :func:`~fastast.create_model`.
        family: ``"transformers"`` for an AST with Hugging Face's keys. Default: the model's own.

    Returns:
        A state dict of detached tensors, without a leading ``module.``.

    Raises:
        ValueError: a model that no original has.
    """
    own, convert = _INVERSES.get(type(model), (None, None))
    if family == "transformers" and own == "ast":
        convert = transformers.to_state_dict
    elif own is None or family not in (None, own):
        known = [f"{kind.__name__} ({name})" for kind, (name, _) in _INVERSES.items()]
        raise ValueError(
            f"family {family or 'of its own'} has no {type(model).__name__}: there are "
            f"{', '.join(known)}, and AST (transformers)"
        )
    return {key: value.detach().contiguous() for key, value in convert(model).items()}

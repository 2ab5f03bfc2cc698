"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from torch import nn

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_PRETRAINING: dict[str, Callable[..., nn.Module]] = {}


def register_model(
    name: str,
    build: Callable[..., nn.Module],
    *,
    pretraining: Callable[..., nn.Module] | None = None,
) -> None:
    """Makes ``build(num_classes, **kwargs)`` available as ``create_model(name, ...)``.

    Args:
        name: of the model.
        build: its classifier.
        pretraining: ``pretraining(**kwargs)`` builds it as it is pre-trained without labels, for
            :func:`create_pretraining_model`.
    """
    if name in _BUILDERS:
        raise ValueError(f"a model named {name!r} is registered already")
    _BUILDERS[name] = build
    if pretraining is not None:
        _PRETRAINING[name] = pretraining


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` accepts, such as ``list_models("ast_*")``."""
    return sorted(name for name in _BUILDERS if fnmatch(name, pattern))


def create_model(name: str, num_classes: int, **kwargs) -> nn.Module:
    """Builds a model with random weights.

    Args:
        name: one of :func:`list_models`.
        num_classes: of the logits.
        **kwargs: of the model's class, over the defaults of the named size.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(list_models())}; got {name!r}")
    return _BUILDERS[name](num_classes, **kwargs)


def create_pretraining_model(name: str, **kwargs) -> nn.Module:
    """Builds a model as its own method pre-trains it, with random weights.

    It has that method's tokens and heads in place of a classifier. A model of
    :func:`create_model` takes its weights over with ``start_from``.

    Args:
        name: one of :func:`list_models`.
        **kwargs: of the model's class, over the defaults of the named size.

    Raises:
        ValueError: an unknown name, or a model that is not pre-trained without labels.
    """
    if name not in _PRETRAINING:
        known = ", ".join(sorted(_PRETRAINING))
        raise ValueError(f"name must be one of {known} to pre-train without labels; got {name!r}")
    return _PRETRAINING[name](**kwargs)

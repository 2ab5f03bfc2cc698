"""Checks that the sections of a recipe share."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any, section: str) -> None:
    """Rejects a value that is not among those of its ``Literal`` type.

    The command line checks types by itself; recipes made in Python are checked here.

    Raises:
        ValueError: naming the setting and its choices.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        parts = [hint, *get_args(hint)]  # Literal[...], or Literal[...] | None
        choices = sum((get_args(part) for part in parts if get_origin(part) is Literal), ())
        if choices and value not in choices and not (value is None and type(None) in parts):
            raise ValueError(
                f"{section}.{name} must be one of {', '.join(map(str, choices))}, got {value!r}"
            )

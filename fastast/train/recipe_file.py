"""Recipe files: YAML with the sections of a recipe, and an experiment's settings as an axis.

A file that holds one experiment at several settings lists under ``settings`` what is different in
each. Sections are merged key by key; ``phases`` are taken whole::

    model: {name: ast_base}
    train: {epochs: 20}
    settings:
      baseline: {}
      coarse to fine:
        phases: [{compression: 4, epochs: 5}, {epochs: 20}]
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import yaml


def read_recipe_file(path: str | PathLike, setting: str | None = None) -> dict:
    """The sections of a recipe, at one of the file's settings.

    Args:
        path: of the file.
        setting: one of :func:`settings_in`, if there are any.

    Raises:
        ValueError: the file is missing or no recipe, or has no such setting, or several of which
            none is named.
    """
    sections = _load(path)
    settings = sections.pop("settings", None) or {}
    if setting is None and not settings:
        return sections
    if setting not in settings:
        what = "name one" if setting is None else f"it has no setting {setting!r}"
        raise ValueError(
            f"{path} holds several settings; {what} of {', '.join(settings)} (--setting)"
            if settings
            else f"{path} has no settings to choose from; leave out --setting"
        )
    for name, part in (settings[setting] or {}).items():
        both = isinstance(part, dict) and isinstance(sections.get(name), dict)
        sections[name] = sections[name] | part if both else part
    return sections


def settings_in(path: str | PathLike) -> list[str]:
    """The names of a recipe file's settings; empty if it holds a single experiment.

    Raises:
        ValueError: the file is missing or no recipe.
    """
    return list(_load(path).get("settings") or {})


def _load(path: str | PathLike) -> dict:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe file {path}")
    try:
        sections = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"{path} is not a recipe: it has no sections")
    return sections

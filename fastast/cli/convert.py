"""``fastast convert``."""

from __future__ import annotations

import json

from fastast.cli.options import parser_of
from fastast.data.files import read_class_table
from fastast.train.convert import convert, export


def main(argv: list[str]) -> None:
    """Makes a run of published weights, or published weights of a run."""
    parser = parser_of("convert")
    parser.add_argument("source", type=str, help="published weights or folder; with --to, a run")
    parser.add_argument("out", type=str, help="run directory; with --to, the file or folder")
    parser.add_argument(
        "--to",
        type=str,
        help="the other way: 'original' for the keys of the original code, or 'transformers'",
    )
    parser.add_argument("--family", type=str, help="whose weights (what their keys say)")
    parser.add_argument(
        "--config", type=str, help="JSON of what keys cannot say: '{\"stride\": ..}'"
    )
    parser.add_argument("--labels", type=str, help="table of classes: index,mid,display_name")
    parser.add_argument("--multi-label", type=bool, help="clips have any number of classes")
    parser.add_argument("--mean", type=float, help="of the log-mel values trained on")
    parser.add_argument("--std", type=float, help="their standard deviation")
    parser.add_argument("--accept-license", action="store_true", help="of restricted weights")
    options = parser.parse_args(argv)
    if options.to is not None:
        if options.to not in ("original", "transformers"):
            raise ValueError(f"--to must be original or transformers, got {options.to!r}")
        export(options.source, options.out, family=options.to.replace("original", "") or None)
        print(f"Wrote {options.out}")
        return
    try:
        config = json.loads(options.config) if options.config else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--config must be JSON: {error}") from error
    recipe, notes = convert(
        options.source,
        options.out,
        family=options.family,
        config=config,
        class_names=read_class_table(options.labels)[1] if options.labels else None,
        multi_label=options.multi_label,
        mean=options.mean,
        std=options.std,
        accept_license=options.accept_license,
    )
    print(
        f"{notes['source']}: {notes['family']} (license: {notes['license']}), {recipe.model.name}"
    )
    print(f"The run is in {options.out}; next: fastast evaluate, predict, embed, or model.init")

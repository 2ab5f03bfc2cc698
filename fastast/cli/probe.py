"""``fastast probe``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastast.cli.options import add_model, parser_of, print_left_out
from fastast.train import load_data, load_model
from fastast.train.loop import pick_device, pick_workers
from fastast.train.metrics import headline
from fastast.train.probe import probe
from fastast.train.run import write_atomically


def main(argv: list[str]) -> None:
    """Probes a model's embeddings and writes what it found beside it."""
    parser = parser_of("probe")
    add_model(parser)
    parser.add_argument("--kind", type=str, help="format of the clips, if not the recipe's")
    parser.add_argument("--root", type=str, help="folder of the clips, if not the recipe's")
    parser.add_argument("--options", type=dict, help="of that format, such as '{fold: 1}'")
    parser.add_argument("--labels", type=float, default=1.0, help="share of training labels to use")
    options = parser.parse_args(argv)
    if not 0 < options.labels <= 1:
        raise ValueError(f"--labels must lie in (0, 1], got {options.labels}")

    method, recipe, _ = load_model(options.checkpoint)
    data = recipe.data
    if options.kind is not None and options.kind != data.kind:
        data = replace(data, kind=options.kind, options={})
    if options.root is not None:
        data = replace(data, root=options.root)
    if options.options is not None:
        data = replace(data, options=options.options)
    recipe = replace(recipe, data=data)
    splits = load_data(data)
    if options.labels < 1 and splits.train is not None:
        splits.train = splits.train.split(options.labels, recipe.train.seed)[1]
    device = pick_device(options.device)
    found = probe(
        method.to(device),
        recipe,
        splits,
        device,
        workers=pick_workers(recipe.train, device, 1),
        titled=True,
    )
    Console().print(_table(found))
    for part in filter(None, (splits.train, splits.validation, splits.test)):
        print_left_out(part.left_out)
    folder = Path(options.checkpoint)
    folder = folder if folder.is_dir() else folder.parent
    result = {"kind": data.kind, "options": data.options, "labels": options.labels} | found
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / "probe.json", lambda path: path.write_text(text))
    print(f"Wrote {folder / 'probe.json'}")


def _table(found: dict[str, dict]) -> Table:
    metric = headline(next(iter(found.values())))
    clips = next(iter(found.values()))["clips"]
    table = Table("probe", f"{metric} on {clips} test clips", "on validation", "chosen")
    for name, row in found.items():
        values = (f"{100 * (row[key] or 0):.2f}%" for key in (metric, "validation"))
        table.add_row(name, *values, f"{row['chosen']:g}")
    return table

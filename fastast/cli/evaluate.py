"""``fastast evaluate``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastast.cli.options import (
    add_model,
    numbers,
    parser_of,
    patch_sizes,
    print_left_out,
    whole_numbers,
)
from fastast.data import AudioDataset
from fastast.train import Recipe, Score, evaluate, evaluate_over, load_data, load_model, make_loader
from fastast.train.build import seconds_of
from fastast.train.curves import write_curves
from fastast.train.figures import plot_curves, plot_per_class
from fastast.train.loop import pick_device, pick_workers
from fastast.train.metrics import ClassScore
from fastast.train.run import write_atomically

_METRICS = {"accuracy": "accuracy", "mAP": "mAP", "mAUC": "mAUC", "d_prime": "d'", "loss": "loss"}


def main(argv: list[str]) -> None:
    """Evaluates a trained model and writes what it found beside it."""
    parser = parser_of("evaluate")
    add_model(parser)
    parser.add_argument("--split", type=str, default="test", help="test, validation or train")
    parser.add_argument("--root", type=str, help="where the recipe's data lies, if it was moved")
    parser.add_argument("--folder", type=str, help="evaluate all of this folder per class instead")
    parser.add_argument("--lengths", type=str, help="in seconds, such as 0.5,1,2,5")
    parser.add_argument(
        "--frames", type=str, help="lengths in frames of the recipe's frame shift, as in 256,512"
    )
    parser.add_argument("--frame-shifts", type=str, help="in milliseconds, such as 10,20,30")
    parser.add_argument("--time-pools", type=str, help="frames pooled to one, such as 1,2,3,4")
    parser.add_argument(
        "--patch-sizes", type=str, help="of a FlexiAST, such as 8,16,16x32 (mel bins x frames)"
    )
    parser.add_argument(
        "--rolls", type=int, default=1, help="beginnings to hear clips from, 10 for HTS-AT"
    )
    parser.add_argument(
        "--per-class", action="store_true", help="list, write and draw the score of each class"
    )
    options = parser.parse_args(argv)
    lengths = numbers("--lengths", options.lengths)
    shifts = numbers("--frame-shifts", options.frame_shifts)
    frames = whole_numbers("--frames", options.frames)
    pools = whole_numbers("--time-pools", options.time_pools)
    sizes = patch_sizes("--patch-sizes", options.patch_sizes)

    method, recipe, class_names = load_model(options.checkpoint)
    device = pick_device(options.device)
    method.to(device)
    dataset = _find_clips(recipe, options.split, options.root, options.folder)
    if dataset.class_names != class_names:
        raise ValueError(
            f"the model knows the classes {class_names}, the data has {dataset.class_names}"
        )
    what = options.folder or f"{options.split} set"
    workers = pick_workers(recipe.train, device, 1)
    loader = make_loader(recipe, dataset, method.model.geometry, workers=workers)
    whole = evaluate(method, loader, device, rolls=options.rolls, title=f"Evaluating {what}")
    if options.rolls > 1:
        what = f"{what}, mean of {options.rolls} rolls"
    rows = evaluate_over(
        method,
        recipe,
        dataset,
        lengths=sorted({*lengths, *(seconds_of(recipe, count) for count in frames)}),
        compression=[shift / recipe.frontend.frame_shift_ms for shift in shifts],
        time_pools=pools,
        patch_sizes=sizes,
        device=device,
        workers=workers,
        title="Evaluating",
    )

    named = {what: whole.to_dict()}
    named |= {f"at most {row['at']:.5g} s": row for row in rows["lengths"]}
    named |= {f"frame shift {row['frame_shift_ms']:g} ms": row for row in rows["compression"]}
    named |= {f"{row['at']} frames pooled to one": row for row in rows["time_pools"]}
    for row in rows["patch_sizes"]:
        named["patches of {}x{}".format(*row["at"])] = row
    console = Console()
    console.print(_table(named))
    print_left_out(whole.left_out)
    if whole.absent_classes:
        total = len(class_names)
        present = total - whole.absent_classes
        print(f"mAP and mAUC are over {present} of {total} classes; no clip has the others")

    folder = Path(options.checkpoint)
    folder = folder if folder.is_dir() else folder.parent
    result = {"clips_of": what, "whole": {"seconds": _longest(recipe, dataset)}} | rows
    result["whole"] |= whole.to_dict()
    result["left_out"] = [clip._asdict() for clip in whole.left_out]
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "evaluation.json", lambda path: path.write_text(text))
    print(f"Wrote {folder / 'evaluation.json'}")
    if any(rows.values()):
        plot_curves({folder.name: result}, folder / "evaluation.png")
        write_curves({folder.name: result}, folder / "evaluation.csv")
        print(f"Wrote {folder / 'evaluation.png'} and evaluation.csv")
    if options.per_class:
        classes = _by_precision(class_names, whole)
        console.print(_class_table(classes))
        _write_csv(folder / "per_class.csv", classes)
        plot_per_class(classes, folder / "per_class.png")
        print(f"Wrote {folder / 'per_class.csv'} and per_class.png")


def _find_clips(recipe: Recipe, split: str, root: str | None, folder: str | None) -> AudioDataset:
    if folder:
        return AudioDataset.from_folder(
            folder, recipe.data.sample_rate, bad_files=recipe.data.bad_files
        )
    recipe.data.root = root or recipe.data.root
    if split not in ("train", "validation", "test"):
        raise ValueError(f"--split must be train, validation or test, got {split!r}")
    dataset = getattr(load_data(recipe.data, [split]), split)
    if dataset is None:
        raise ValueError(
            f"the data has no {split} part, and the recipe cuts none off (data.{split} is 0)"
        )
    return dataset


def _longest(recipe: Recipe, dataset: AudioDataset) -> float:
    """Seconds of the longest input that the model has."""
    longest = float(max(dataset.lengths)) / dataset.sample_rate
    limit = recipe.data.max_seconds
    return recipe.frontend.fixed_seconds or (longest if limit is None else min(longest, limit))


def _table(named: dict[str, dict]) -> Table:
    shown = [key for key in _METRICS if key in next(iter(named.values()))]
    table = Table("evaluated on", *(_METRICS[key] for key in shown), "clips", "left out", "tokens")
    for name, row in named.items():
        counts = (str(row[key]) for key in ("clips", "left_out", "tokens"))
        table.add_row(name, *(_cell(key, row[key]) for key in shown), *counts)
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if key in ("loss", "d_prime") else f"{value:.2%}"


def _by_precision(names: list[str], score: Score) -> list[tuple[str, ClassScore]]:
    """Best first, classes without a clip last."""
    classes = zip(names, score.per_class, strict=True)
    return sorted(classes, key=lambda pair: -1.0 if pair[1].ap is None else pair[1].ap)[::-1]


def _class_table(classes: list[tuple[str, ClassScore]]) -> Table:
    single = any(score.recall is not None for _, score in classes)
    table = Table("class", "clips", "AP", "AUC", *["recall"] * single)
    for name, score in classes:
        cells = (score.ap, score.auc, *[score.recall] * single)
        table.add_row(name, str(score.positives), *(_cell("", value) for value in cells))
    return table


def _write_csv(path: Path, classes: list[tuple[str, ClassScore]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "positives", "AP", "AUC", "recall"])
        table.writerows(
            [name, score.positives, score.ap, score.auc, score.recall] for name, score in classes
        )

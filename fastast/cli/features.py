"""``fastast features``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jsonargparse import Namespace

from fastast.cli.options import parser_of, print_left_out
from fastast.data import LeftOut
from fastast.train import Recipe, load_model
from fastast.train.bar import progress_bar
from fastast.train.features import extract_features, output_names
from fastast.train.figures import plot_features
from fastast.train.recipe import FrontendConfig, preset_defaults
from fastast.train.recipe_file import read_recipe_file, settings_in

_MOST_ROWS = 50
_POSITIVE = ("num_mels", "frame_shift_ms", "frame_length_ms")
_CHANGES = (*_POSITIVE, "low_freq", "high_freq", "window_type")


def main(argv: list[str]) -> None:
    """Writes a .npz file per audio file, and draws it."""
    parser = parser_of("features")
    parser.add_argument("files", type=str, nargs="+", help="audio files of any length")
    parser.add_argument("--out", type=str, default="features", help="folder to write to")
    parser.add_argument("--recipe", type=str, help="take the front end from this recipe file")
    parser.add_argument("--checkpoint", type=str, help="take it from this run or model")
    parser.add_argument(
        "--preset", type=str, help="take this one: kaldi (the default), htsat or epic_sounds"
    )
    parser.add_argument("--sample-rate", type=int, help="in Hz; default: the front end's, 16000")
    parser.add_argument("--num-mels", type=int, help="mel bins; default: the front end's, 128")
    parser.add_argument("--frame-shift-ms", type=float, help="default: the front end's finest, 10")
    parser.add_argument("--frame-length-ms", type=float, help="default: the front end's, 25")
    parser.add_argument("--low-freq", type=float, help="in Hz; default: the front end's, 20")
    parser.add_argument(
        "--high-freq", type=float, help="in Hz; default: the front end's, half the sample rate"
    )
    parser.add_argument("--window-type", type=str, help="default: the front end's, hanning")
    parser.add_argument(
        "--pictures", type=str, default="each", help="each file's own, one sheet of all, or none"
    )
    options = parser.parse_args(argv)
    sheet = options.pictures == "sheet"
    if options.pictures not in ("each", "sheet", "none"):
        raise ValueError(f"--pictures must be each, sheet or none, got {options.pictures!r}")
    if sheet and len(options.files) > _MOST_ROWS:
        raise ValueError(f"--pictures sheet has room for {_MOST_ROWS} files; choose each or none")

    recipe = _front_end(options)
    left_out, rows = [], []
    out = Path(options.out)
    names = output_names(options.files)
    with progress_bar("Features", len(names), "files") as advance:
        for name, found in zip(names, extract_features(options.files, recipe), strict=True):
            advance(1)
            if isinstance(found, LeftOut):
                left_out.append(found)
                continue
            target = out / f"{name}.npz"
            target.parent.mkdir(parents=True, exist_ok=True)
            found.save(target)
            if options.pictures == "each":
                plot_features([found], target.with_suffix(".png"))
            rows += [found] * sheet
    print_left_out(left_out)
    count = len(names) - len(left_out)
    if not count:
        raise ValueError("none of the files can be used")
    if sheet:
        plot_features(rows, out / "features.png")
    print(f"Wrote the features of {count} files to {out}; {len(left_out)} were left out")


def _read_recipe(path: Path) -> Recipe:
    first = next(iter(settings_in(path)), None)
    return Recipe.from_dict(read_recipe_file(path, first))


def _front_end(options: Namespace) -> Recipe:
    """The default recipe or what is named, with what the command line changes about it."""
    if sum(map(bool, (options.recipe, options.checkpoint, options.preset))) > 1:
        raise ValueError("--recipe, --checkpoint and --preset exclude each other: give one")
    recipe = Recipe()
    if options.preset:
        front = FrontendConfig(preset=options.preset)
        rate = preset_defaults(front.preset)["sample_rate"]
        recipe = Recipe(data=replace(recipe.data, sample_rate=rate), frontend=front)
    elif options.recipe:
        recipe = _read_recipe(Path(options.recipe))
    elif options.checkpoint:
        recipe = load_model(options.checkpoint)[1]
    changes = {name: options[name] for name in _CHANGES if options[name] is not None}
    for name in _POSITIVE:
        if changes.get(name, 1) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {changes[name]}")
    if "frame_shift_ms" in changes:
        changes["compression"] = [1.0]
    if options.sample_rate is not None:
        if options.sample_rate <= 0:
            raise ValueError(f"--sample-rate must be positive, got {options.sample_rate}")
        recipe = replace(recipe, data=replace(recipe.data, sample_rate=options.sample_rate))
    return replace(recipe, frontend=replace(recipe.frontend, **changes))

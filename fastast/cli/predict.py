"""``fastast predict``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from fastast.cli.options import add_model, parser_of
from fastast.train import load_model
from fastast.train.loop import pick_device
from fastast.train.predict import predict_files
from fastast.train.timeline import predict_timeline, write_timeline


def main(argv: list[str]) -> None:
    """Prints classes and probabilities, a line per file; or writes timelines."""
    parser = parser_of("predict")
    add_model(parser)
    parser.add_argument("files", type=str, nargs="+", help="audio files of any length")
    parser.add_argument("--top", type=int, default=3, help="classes to name per file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--window", type=float, help="seconds of a window: say what is heard when, in --out"
    )
    parser.add_argument("--hop", type=float, help="seconds between windows (half a window)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least probability of an event"
    )
    parser.add_argument(
        "--out", type=str, help="folder for tables, labels and pictures of --window"
    )
    options = parser.parse_args(argv)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    if (options.window is None) != (options.out is None):
        raise ValueError("--window and --out belong together: give both or neither")
    if options.hop is not None and options.window is None:
        raise ValueError("--hop needs --window and --out")
    if not 0 < options.threshold < 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {options.threshold}")

    method, recipe, class_names = load_model(options.checkpoint)
    device = pick_device(options.device)
    method.to(device)
    if options.window is not None:
        for file, name in zip(options.files, _names(options.files), strict=True):
            timeline = predict_timeline(
                method,
                recipe,
                file,
                device,
                window=options.window,
                hop=options.hop,
                class_names=class_names,
                title=Path(file).name,
            )
            write_timeline(timeline, options.out, name, options.threshold)
            count = len(timeline.events(options.threshold))
            windows = len(timeline.probabilities)
            print(f"{file}: {count} events in {windows} windows, {options.out}/{name}.*")
        return
    found = predict_files(method, recipe, options.files, device, title="Predicting")
    for path, probabilities in zip(options.files, found, strict=True):
        best = probabilities.topk(min(options.top, len(class_names)))
        named = [
            (class_names[index], share)
            for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        if options.json:
            print(json.dumps({"file": path, "classes": dict(named)}))
        else:
            print(path, *(f"{name} {share:.1%}" for name, share in named), sep="  ")


def _names(files: list[str]) -> list[str]:
    """Of what is written: the file's, with a number where several have it."""
    stems = [Path(file).stem for file in files]
    count, seen, names = Counter(stems), Counter(), []
    for stem in stems:
        seen[stem] += 1
        names.append(f"{stem}-{seen[stem]}" if count[stem] > 1 else stem)
    return names

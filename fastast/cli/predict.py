"""``fastast predict``."""

from __future__ import annotations

import json

from fastast.cli.options import add_model, parser_of
from fastast.train import load_model
from fastast.train.loop import pick_device
from fastast.train.predict import predict_files


def main(argv: list[str]) -> None:
    """Prints classes and probabilities, a line per file."""
    parser = parser_of("predict")
    add_model(parser)
    parser.add_argument("files", type=str, nargs="+", help="audio files of any length")
    parser.add_argument("--top", type=int, default=3, help="classes to name per file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")

    method, recipe, class_names = load_model(options.checkpoint)
    device = pick_device(options.device)
    found = predict_files(method.to(device), recipe, options.files, device, title="Predicting")
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

"""``fastast reconstruct``."""

from __future__ import annotations

from pathlib import Path

import torch

from fastast.cli.options import add_model, parser_of, print_left_out
from fastast.data import LeftOut, write_wav
from fastast.train import load_model
from fastast.train.bar import progress_bar
from fastast.train.features import output_names
from fastast.train.figures import plot_reconstructions
from fastast.train.loop import pick_device
from fastast.train.reconstruct import reconstruct, sound_of


def main(argv: list[str]) -> None:
    """Draws, and writes as sound, what a model restores of each file."""
    parser = parser_of("reconstruct")
    add_model(parser)
    parser.add_argument("files", type=str, nargs="+", help="audio files of any length")
    parser.add_argument("--out", type=str, default="reconstructions", help="folder to write to")
    parser.add_argument("--ratio", type=float, default=0.3, help="share that is hidden")
    parser.add_argument(
        "--max-seconds", type=float, default=10.0, help="use the beginning of longer files"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--sound", type=bool, default=True, help="write .wav files, too")
    options = parser.parse_args(argv)
    if options.max_seconds <= 0:
        raise ValueError(f"--max-seconds must be positive, got {options.max_seconds}")

    method, recipe, _ = load_model(options.checkpoint)
    method.to(pick_device(options.device))
    names, left_out, out = output_names(options.files), [], Path(options.out)
    results = reconstruct(
        method,
        recipe,
        options.files,
        options.ratio,
        max_seconds=options.max_seconds,
        seed=options.seed,
    )
    with progress_bar("Reconstructing", len(names), "files") as advance:
        for name, result in zip(names, results, strict=True):
            advance(1)
            if isinstance(result, LeftOut):
                left_out.append(result)
                continue
            features, made = result
            target = out / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            plot_reconstructions(features, made, target)
            for each in made:
                print(f"{name}: {each.masking}, mean squared error {each.error:.3f}")
            if not options.sound:
                continue
            sounds = {"original": torch.from_numpy(features.frames)}
            for each in made:
                sounds[f"{each.masking}.masked"] = each.masked
                sounds[f"{each.masking}.restored"] = each.restored
            for kind, frames in sounds.items():
                samples = sound_of(frames, features, recipe)
                write_wav(out / f"{name}.{kind}.wav", samples, features.sample_rate)
    print_left_out(left_out)
    count = len(names) - len(left_out)
    if not count:
        raise ValueError("none of the files can be used")
    print(f"Wrote reconstructions of {count} files to {out}; {len(left_out)} were left out")

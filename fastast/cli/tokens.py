"""``fastast tokens``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fastast.cli.options import numbers, parser_of, print_left_out, whole_numbers
from fastast.data import AudioDataset, samples_in
from fastast.data.usage import ROW, token_usage
from fastast.ops import hop_from_ms
from fastast.tokens import PatchGeometry
from fastast.train import Recipe
from fastast.train.build import framing_of
from fastast.train.embed import find_clips


def main(argv: list[str]) -> None:
    """Prints the table, and writes it if asked to."""
    parser = parser_of("tokens")
    parser.add_argument(
        "clips",
        type=str,
        nargs="+",
        help="audio files, a folder, a manifest (.csv), or seconds, one number a line (.txt)",
    )
    parser.add_argument("--frame-shift-ms", type=float, default=10.0, help="of 25-ms frames")
    parser.add_argument("--patch-frames", type=int, default=16, help="of patches, 8 to a column")
    parser.add_argument("--max-seconds", type=float, default=30.735, help="cut longer clips first")
    parser.add_argument("--fixed", type=str, default="400,1024,1600", help="fixed lengths, frames")
    parser.add_argument("--batches", type=str, default="12,24,48,96", help="clips of a batch")
    parser.add_argument("--row", type=int, default=ROW, help="tokens of a row of ElasticAST")
    parser.add_argument("--out", type=str, help="a .csv file to write the table to")
    options = parser.parse_args(argv)
    fixed = whole_numbers("--fixed", options.fixed)
    batches = whole_numbers("--batches", options.batches)

    recipe = Recipe()
    rate = recipe.data.sample_rate
    samples = _lengths(options.clips, rate)
    geometry = PatchGeometry(patch_size=(16, options.patch_frames))
    used = np.minimum(samples, samples_in(options.max_seconds, rate))
    frames = framing_of(recipe).num_frames(used, hop_from_ms(options.frame_shift_ms, rate))
    tokens = np.maximum(geometry.num_tokens(frames), geometry.freq_patches)
    rows = token_usage(
        tokens,
        fixed=[int(geometry.num_tokens(count)) for count in fixed],
        batches=batches,
        row=options.row,
    )
    print(
        f"{len(tokens):,} clips, {samples.sum() / rate / 3600:,.2f} h, {samples.mean() / rate:.2f} "
        f"s on average; {int(tokens.sum()):,} tokens in the first {options.max_seconds:g} s of each"
    )
    Console().print(_table(rows))
    if options.out:
        with open(options.out, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        print(f"Wrote {options.out}")


def _lengths(sources: list[str], rate: int) -> np.ndarray:
    """Samples of each clip."""
    if len(sources) == 1 and Path(sources[0]).suffix == ".txt":
        seconds = numbers(sources[0], ",".join(Path(sources[0]).read_text().split()))
        return np.array([samples_in(each, rate) for each in seconds], np.int64)
    dataset = AudioDataset(find_clips(sources), rate, cache=False, bad_files="skip")
    print_left_out(dataset.left_out)
    return dataset.lengths


def _table(rows: list[dict]) -> Table:
    table = Table("input", "clips of a batch", "tokens computed", "padding", "cut")
    for row in rows:
        batch = "any" if row["batch"] is None else str(row["batch"])
        shares = (f"{row[key]:.1%}" for key in ("padding", "cut"))
        table.add_row(row["input"], batch, f"{row['computed']:,}", *shares)
    return table

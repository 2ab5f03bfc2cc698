"""``fastast embed``."""

from __future__ import annotations

from fastast.cli.options import add_model, parser_of, print_left_out
from fastast.data import AudioDataset
from fastast.train import load_model
from fastast.train.embed import embed, find_clips, write_embeddings
from fastast.train.loop import pick_device, pick_workers


def main(argv: list[str]) -> None:
    """Embeds clips and writes one file."""
    parser = parser_of("embed")
    add_model(parser)
    parser.add_argument(
        "clips", type=str, nargs="+", help="audio files, a folder, or a manifest (.csv)"
    )
    parser.add_argument("--out", type=str, required=True, help="a .npz or .parquet file")
    options = parser.parse_args(argv)

    method, recipe, _ = load_model(options.checkpoint)
    device = pick_device(options.device)
    dataset = AudioDataset(
        find_clips(options.clips), recipe.data.sample_rate, cache=False, bad_files="skip"
    )
    workers = pick_workers(recipe.train, device, 1)
    chunks = embed(method.to(device), recipe, dataset, device, workers=workers, title="Embedding")
    count, left_out = write_embeddings(options.out, chunks)
    left_out = (*dataset.left_out, *left_out)
    print_left_out(left_out)
    print(f"Wrote {count} embeddings to {options.out}; {len(left_out)} clips were left out")

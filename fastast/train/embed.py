"""Clip embeddings: what a trained model's classifier reads, for use elsewhere.

An embedding is the pooled representation of a whole clip after the model's last norm. Clips of
any lengths share batches. Chunks of consecutive clips come out one by one, so that any number of
clips can be embedded in little memory, and what is written keeps their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast.data import AudioDataset, LeftOut, Manifest
from fastast.data.files import find_audio
from fastast.methods import Supervised
from fastast.train.bar import progress_bar
from fastast.train.build import make_loader
from fastast.train.recipe import Recipe
from fastast.train.run import write_atomically

CHUNK = 1024
"""Clips that are embedded, and written, at a time."""


class Embeddings(NamedTuple):
    """Of some of the clips.

    Attributes:
        names: of the clips in their manifest.
        paths: of their files.
        vectors: float32 ``[clips, dim]``, on the CPU.
        left_out: clips among them that could not be decoded.
    """

    names: list[str]
    paths: list[str]
    vectors: Tensor
    left_out: tuple[LeftOut, ...] = ()


def find_clips(sources: Sequence[str]) -> Manifest:
    """The clips that a command line names.

    Args:
        sources: audio files; or one folder, for all audio files below it; or one ``.csv``
            manifest.

    Raises:
        ValueError: a folder without audio files, or a manifest that cannot be read.
    """
    first = Path(sources[0])
    if len(sources) == 1 and first.is_dir():
        files = find_audio(first)
        if not files:
            raise ValueError(f"{first} holds no audio files")
        return Manifest(files, [()] * len(files), [], first)
    if len(sources) == 1 and first.suffix.lower() == ".csv":
        return Manifest.from_csv(first)
    return Manifest.from_files(sources)


@torch.inference_mode()
def embed(
    method: Supervised,
    recipe: Recipe,
    dataset: AudioDataset,
    device: torch.device | str,
    *,
    workers: int = 0,
    title: str | None = None,
) -> Iterator[Embeddings]:
    """Embeds the clips, in their order, at most :data:`CHUNK` at a time.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`. Clips count whole, whatever
            ``data.max_seconds`` was in training; a model of fixed input size reads their
            beginning.
        dataset: the clips.
        device: of the method.
        workers: processes that decode; 0 leaves it to a thread.
        title: of a progress bar, where the output is a terminal. Default: none.
    """
    recipe = replace(recipe, data=replace(recipe.data, max_seconds=None, bad_files="skip"))
    with progress_bar(title, len(dataset), "clips") as advance:
        for begin in range(0, len(dataset), CHUNK):
            part = dataset.subset(range(begin, min(begin + CHUNK, len(dataset))))
            loader = make_loader(recipe, part, method.model.geometry, views=1, workers=workers)
            found: dict[int, Tensor] = {}
            left_out: tuple[LeftOut, ...] = ()
            for batch in loader.epoch(0):
                left_out += tuple(batch.left_out)
                ids = batch.clip_ids.tolist()
                batch = batch.to(device, non_blocking=True)
                vectors = method.model.embed(method.frontend(batch), batch.grid).float().cpu()
                found |= {clip: row for clip, row in zip(ids, vectors, strict=True) if clip >= 0}
                advance(batch.num_clips)
            rows = [row for row, clip in enumerate(part.clip_ids.tolist()) if clip in found]
            yield Embeddings(
                [part.names[row] for row in rows],
                [str(part.paths[row]) for row in rows],
                torch.stack([found[int(part.clip_ids[row])] for row in rows])
                if rows
                else torch.empty(0, 0),
                left_out,
            )


def write_embeddings(
    path: str | PathLike, chunks: Iterable[Embeddings]
) -> tuple[int, tuple[LeftOut, ...]]:
    """Writes embeddings to one file, which appears when it is complete.

    Args:
        path: ``.npz``, with ``embeddings`` float32 ``[clips, dim]``, ``names`` and ``paths``; or
            ``.parquet``, with columns ``name``, ``path`` and ``embedding``, written as it comes.
        chunks: from :func:`embed`.

    Returns:
        How many were written, and the clips that were left out.

    Raises:
        ValueError: another suffix, pyarrow is missing, or there is nothing to write.
    """
    path = Path(path)
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise ValueError(f"embeddings are written to .npz or .parquet, not to {path}")
    count, left_out = 0, []

    def counted() -> Iterator[Embeddings]:
        nonlocal count
        for chunk in chunks:
            left_out.extend(chunk.left_out)
            count += len(chunk.names)
            if chunk.names:
                yield chunk
        if not count:
            raise ValueError(f"there is nothing to write: {len(left_out)} clips were left out")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: writers[path.suffix](temporary, counted()))
    return count, tuple(left_out)


def _write_npz(path: Path, chunks: Iterator[Embeddings]) -> None:
    names, paths, vectors, _ = zip(*chunks, strict=True)
    with open(path, "wb") as file:
        np.savez(
            file,
            embeddings=torch.cat(vectors).numpy(),
            names=np.array(sum(names, [])),
            paths=np.array(sum(paths, [])),
        )


def _write_parquet(path: Path, chunks: Iterator[Embeddings]) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError("Parquet needs pyarrow: pip install pyarrow, or write .npz") from error

    writer = None
    try:
        for names, paths, vectors, _ in chunks:
            flat = pa.array(vectors.flatten().numpy())
            table = pa.table(
                {
                    "name": names,
                    "path": paths,
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
                }
            )
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()

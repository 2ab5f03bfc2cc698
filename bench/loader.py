"""How fast clips are decoded and packed, and how long training waits for them.

``python -m bench.loader`` writes clips of 10 s in several formats and reads them back. Each
row says

    decode           clips decoded per second and core, alone
    batches          clips per second and core that come out as packed batches
    wait             share of a training run's time in which no batch was ready

The decoded clips are int16 at 16 kHz, ready for the device; spectrograms are the device's work.
Cores are counted as the processor time that was used, by all processes and threads together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench import report, results

RATE = 16_000
SECONDS = 10.0


def _write_wav(path: Path, samples: np.ndarray) -> None:
    import soundfile

    soundfile.write(path.with_suffix(".wav"), samples, RATE, subtype="PCM_16")


def _write_flac(path: Path, samples: np.ndarray) -> None:
    import soundfile

    soundfile.write(path.with_suffix(".flac"), samples, RATE, subtype="PCM_16")


def _write_stereo_flac(path: Path, samples: np.ndarray) -> None:
    """44.1 kHz and two channels that differ: to be resampled and mixed down."""
    import soundfile
    import soxr

    high = soxr.resample(samples / 32768, RATE, 44_100)
    stereo = np.stack([high, 0.8 * np.roll(high, 40)], 1)
    soundfile.write(path.with_suffix(".flac"), stereo, 44_100, subtype="PCM_16")


FORMATS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "WAV, 16 kHz": _write_wav,
    "FLAC, 16 kHz": _write_flac,
    "FLAC, 44.1 kHz stereo": _write_stereo_flac,
}


def table(clips_per_class: int, steps: int) -> Iterator[dict]:
    """Measures every format.

    Args:
        clips_per_class: of eight classes; the clips of a data set.
        steps: of the training run whose waiting is measured; 0 leaves it out.
    """
    from fastast.data import generate_sounds, read_audio

    with tempfile.TemporaryDirectory() as scratch:
        sounds = generate_sounds(
            Path(scratch) / "sounds", clips_per_class, 1, seconds=(SECONDS, SECONDS)
        )
        originals = sorted((sounds / "train").rglob("*.wav"))
        for number, (name, write) in enumerate(FORMATS.items()):
            root = Path(scratch) / str(number)
            for original in originals:
                path = root / original.parent.name / original.stem
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, read_audio(original, RATE).numpy())
            yield {"format": name} | measure(root, steps, Path(scratch) / f"run-{number}")


def measure(root: Path, steps: int, run_dir: Path) -> dict:
    """Decoding, packing and waiting, of a folder per class."""
    from fastast import TokenBudget
    from fastast.data import AudioDataset, PackedLoader, Planner, read_audio
    from fastast.ops import Framing
    from fastast.tokens import PatchGeometry

    dataset = AudioDataset.from_folder(root, RATE, cache=False)
    geometry = PatchGeometry()
    longest = geometry.num_tokens(1024)
    paths = list(dataset.paths)
    decode = _per_core_second(lambda: [read_audio(path, RATE) for path in paths], len(paths))
    budget = TokenBudget(16 * longest, 16, longest)
    planner = Planner(dataset, geometry, budget=budget, framing=Framing(RATE * 25 // 1000))
    loader = PackedLoader(planner)
    batches = _per_core_second(lambda: list(loader.epoch(0)), len(paths))
    return {
        "clips": len(paths),
        "bytes_per_clip": sum(path.stat().st_size for path in paths) // len(paths),
        "decode": decode,
        "batches": batches,
        "wait": _wait(root, steps, run_dir) if steps else None,
    }


def _per_core_second(work: Callable[[], object], clips: int, reps: int = 5) -> float:
    """Clips per second of processor time: the median of some repetitions, after one more."""
    work()
    rates = []
    for _ in range(reps):
        begin = time.process_time()
        work()
        rates.append(clips / (time.process_time() - begin))
    return float(np.median(rates))


def _wait(root: Path, steps: int, run_dir: Path) -> float:
    """Share of the time that ElasticAST-tiny, trained on this machine's CPU, waits for batches."""
    from fastast.train import (
        DataConfig,
        FrontendConfig,
        Recipe,
        RunDirectory,
        TrainConfig,
        fit,
    )

    recipe = Recipe(
        DataConfig(root=str(root), validation=0.0, test=0.0),
        FrontendConfig(mean=-5.0, std=4.0),
        train=TrainConfig(
            epochs=1000, max_tokens=steps * 2048, batch_tokens=2048, device="cpu", workers=1
        ),
    )
    fit(recipe, run_dir, quiet=True)
    epochs = RunDirectory(run_dir).metrics("epoch")
    waited = sum(epoch["data_wait"] * epoch["seconds"] for epoch in epochs)
    return waited / sum(epoch["seconds"] for epoch in epochs)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes ``cpu/loader.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.loader",
        description="Measures decoding, packing and how long training waits for it.",
    )
    parser.add_argument(
        "--clips", type=int, default=16, help="of each of 8 classes; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=32, help="of training; default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=results.RESULTS, help="folder; default: %(default)s"
    )
    options = parser.parse_args(arguments)

    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    run = results.current_run("cpu")
    rows = []
    for row in table(options.clips, options.steps):
        rows.append(row)
        header = report.loader_table(rows)
        print("\n".join(header if len(rows) == 1 else header[-1:]), flush=True)
    path = options.out / "cpu" / "loader.json"
    results.write(path, {"schema": results.SCHEMA, "run": run, "rows": rows})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

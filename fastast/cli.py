"""The ``fastast`` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# What only some commands need is imported inside them, so that `doctor` can say what is missing.
EXTRAS = ("jsonargparse", "matplotlib", "rich", "safetensors", "soundfile", "soxr", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"fastast: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fastast {name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"fastast {name} needs {error.name}: pip install 'fastast[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; --resume goes on with the run" if name == "fit" else ""
        print(f"stopped{hint}", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: fastast COMMAND ...", ""]
    lines += [f"  {name:10}{run.__doc__.splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join([*lines, "", "'fastast COMMAND --help' tells more."])


def fit(argv: list[str]) -> None:
    """Trains a model from a recipe file; any setting can be overridden."""
    from jsonargparse import SUPPRESS, ArgumentParser

    from fastast.train import Recipe
    from fastast.train import fit as train

    parser = ArgumentParser(
        prog="fastast fit", usage="fastast fit RECIPE [options]", description=fit.__doc__
    )
    parser.add_argument("--recipe", action="config", help=SUPPRESS)
    parser.add_argument("--run-dir", type=str, help="default: runs/ and the recipe's name")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_class_arguments(Recipe)
    if argv and argv[0] not in ("-h", "--help"):
        recipe_file, *rest = argv
        if recipe_file.startswith("-"):
            raise ValueError(f"the recipe file comes first, then options; got {recipe_file}")
        if not Path(recipe_file).is_file():
            raise ValueError(f"there is no recipe file {recipe_file}")
        argv = ["--recipe", recipe_file, *rest]
    elif not argv:
        argv = ["--help"]
    options = parser.parse_args(argv)
    run_dir = options.run_dir or Path("runs") / Path(recipe_file).stem
    options = parser.instantiate(options)
    recipe = Recipe(options.data, options.frontend, options.model, options.train)
    train(recipe, run_dir, resume=options.resume)
    print(f"The run is in {run_dir}; next: fastast evaluate {run_dir}")


def evaluate(argv: list[str]) -> None:
    """Measures accuracy, also over lengths and frame shifts."""
    from jsonargparse import ArgumentParser
    from rich.console import Console
    from rich.table import Table

    from fastast.data import AudioDataset
    from fastast.train import evaluate as score
    from fastast.train import evaluate_over, load_data, load_model, make_loader
    from fastast.train.figures import plot_curves
    from fastast.train.loop import pick_device

    parser = ArgumentParser(prog="fastast evaluate", description=evaluate.__doc__)
    parser.add_argument("checkpoint", type=str, help="run directory or model.safetensors")
    parser.add_argument("--split", type=str, default="test", help="test, validation or train")
    parser.add_argument("--root", type=str, help="where the recipe's data lies, if it was moved")
    parser.add_argument("--folder", type=str, help="evaluate all of this folder per class instead")
    parser.add_argument("--lengths", type=str, help="in seconds, such as 0.5,1,2,5")
    parser.add_argument("--frame-shifts", type=str, help="in milliseconds, such as 10,20,30")
    parser.add_argument("--device", type=str, default="auto")
    options = parser.parse_args(argv)

    method, recipe, class_names = load_model(options.checkpoint)
    device = pick_device(options.device)
    method.to(device)
    if options.folder:
        dataset = AudioDataset.from_folder(options.folder, recipe.data.sample_rate)
    else:
        recipe.data.root = options.root or recipe.data.root
        splits = vars(load_data(recipe.data))
        if options.split not in splits:
            raise ValueError(f"--split must be one of {', '.join(splits)}")
        dataset = splits[options.split]
        if dataset is None:
            raise ValueError("the recipe sets no clips aside for validation (data.validation is 0)")
    if dataset.class_names != class_names:
        raise ValueError(
            f"the model knows the classes {class_names}, the data has {dataset.class_names}"
        )

    lengths = _numbers("--lengths", options.lengths)
    shifts = _numbers("--frame-shifts", options.frame_shifts)
    rows = evaluate_over(
        method,
        recipe,
        dataset,
        lengths=lengths,
        compression=[shift / recipe.frontend.frame_shift_ms for shift in shifts],
        device=device,
    )
    whole = score(method, make_loader(recipe, dataset, method.model.geometry), device)
    table = Table("evaluated on", "accuracy", "loss", "clips", "tokens")
    what = options.folder or f"{options.split} set"
    table.add_row(what, *_cells(vars(whole)))
    for row in rows["lengths"]:
        table.add_row(f"at most {row['at']:g} s", *_cells(row))
    for row in rows["compression"]:
        shift = row["at"] * recipe.frontend.frame_shift_ms
        table.add_row(f"frame shift {shift:g} ms", *_cells(row))
    Console().print(table)

    folder = Path(options.checkpoint)
    folder = folder if folder.is_dir() else folder.parent
    result = {"clips_of": what, "whole": vars(whole)} | rows
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {folder / 'evaluation.json'}")
    if lengths or shifts:
        figure = folder / "evaluation.png"
        plot_curves({folder.name: rows}, figure, recipe.frontend.frame_shift_ms)
        print(f"Wrote {folder / 'evaluation.png'}")


def predict(argv: list[str]) -> None:
    """Names the most likely classes of audio files."""
    from jsonargparse import ArgumentParser

    from fastast.train import load_model
    from fastast.train.loop import pick_device
    from fastast.train.predict import predict_files

    parser = ArgumentParser(prog="fastast predict", description=predict.__doc__)
    parser.add_argument("checkpoint", type=str, help="run directory or model.safetensors")
    parser.add_argument("files", type=str, nargs="+", help="audio files of any length")
    parser.add_argument("--top", type=int, default=3, help="classes to name per file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--device", type=str, default="auto")
    options = parser.parse_args(argv)

    method, recipe, class_names = load_model(options.checkpoint)
    device = pick_device(options.device)
    found = predict_files(method.to(device), recipe, options.files, device)
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


def doctor(argv: list[str]) -> int:
    """Checks this installation and says what to mend."""
    if argv:
        raise ValueError(f"doctor takes no options, got {' '.join(argv)}")
    healthy = True

    def report(part: str, found: str, mend: str = "") -> None:
        nonlocal healthy
        healthy &= not mend
        print(f"{part:13} {found:40} {'-> ' + mend if mend else 'ok'}")

    report("Python", sys.version.split()[0])
    for module in ("torch", "numpy", *EXTRAS):
        package = {"yaml": "pyyaml"}.get(module, module)
        try:
            report(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            needed = "'fastast[train]'" if module in EXTRAS else package
            report(package, "missing", f"pip install {needed}")
    try:
        report("triton", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        report("triton", "missing; only GPUs need it")
    if importlib.util.find_spec("fastast._packing"):
        report("native build", "fastast._packing")
    else:
        report("native build", "missing", "pip install -e . --no-build-isolation")

    import torch

    report("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            report("GPU", torch.cuda.get_device_name(index))
    else:
        report("GPU", "none; everything runs on the CPU")
    error = _self_test()
    report("attention", f"error {error:.0e} in float32", "" if error < 1e-5 else "wrong results")
    return 0 if healthy else 1


def _self_test() -> float:
    """Largest error of packed attention on a small ragged batch."""
    import torch

    from fastast import Segments
    from fastast.ops import packed_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    segments = Segments.from_lengths([7, 0, 64, 1])
    q, k, v = torch.randn(3, 72, 3, 64)
    exact = packed_attention(q.double(), k.double(), v.double(), segments, backend="reference")
    found = packed_attention(*(x.to(device) for x in (q, k, v)), segments.to(device))
    return (found.cpu() - exact).abs().max().item()


def _numbers(option: str, text: str | None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from None
    if any(number <= 0 for number in numbers):
        raise ValueError(f"{option} takes positive numbers, got {text!r}")
    return numbers


def _cells(score: dict) -> list[str]:
    return [
        f"{score['accuracy']:.2%}",
        f"{score['loss']:.4f}",
        str(score["clips"]),
        str(score["tokens"]),
    ]


COMMANDS = {"fit": fit, "evaluate": evaluate, "predict": predict, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())

"""From Coarse to Fine on the Free Spoken Digit Dataset, from the recordings to the page in docs/.

    python recipes/fsdd/coarse_to_fine.py --root FOLDER   trains what is missing, writes the results
    python recipes/fsdd/coarse_to_fine.py --report        writes the page from the results

Each run uses one thread. A test set is read once per run, after training, by the weights that were
kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from training import (
    FIGURES,
    HERE,
    REPOSITORY,
    RESULTS,
    SPEAKERS,
    Experiment,
    side_by_side,
    spread,
    table,
    train,
)

sys.path.insert(0, str(REPOSITORY))  # for bench, which is not installed
RESULT = RESULTS / "fsdd_coarse_to_fine.json"
PAGE = REPOSITORY / "docs" / "fsdd_coarse_to_fine.md"
FIGURE = FIGURES / "fsdd_coarse_to_fine.png"
SEEDS = 3

BASELINE = "ast-baseline"
AST = {
    BASELINE: "fine only, the baseline",
    "ast-avg_pool_2": "coarse only, average pool 2",
    "ast-fshift_4_1": "frame shift 4 → 1",
    "ast-fshift_2_1": "frame shift 2 → 1",
    "ast-avg_pool_4_1": "average pool 4 → 1",
    "ast-avg_pool_2_1": "average pool 2 → 1",
    "ast-max_pool_4_1": "max pool 4 → 1",
    "ast-max_pool_2_1": "max pool 2 → 1",
    "ast-patch_bl_4_1": "patch, bilinear 4 → 1",
    "ast-patch_bl_2_1": "patch, bilinear 2 → 1",
    "ast-patch_pi_4_1": "patch, PI 4 → 1",
    "ast-patch_pi_2_1": "patch, PI 2 → 1",
    "ast-fshift_4_2_1": "frame shift 4 → 2 → 1",
}
BEYOND = {
    "elastic-baseline": "ElasticAST, fine only",
    "elastic-fshift_4_1": "frame shift 4 → 1",
    "elastic-moments_4_1": "the same, moments kept",
    "elastic-glide_4_1": "gliding from 4 to 1",
    "elastic-mixed": "mixed from 1 to 4",
}
OTHERS = {
    "hts_at-baseline": "HTS-AT, fine only",
    "hts_at-fshift_4_1": "HTS-AT, frame shift 4 → 1",
    "ssast-baseline": "SSAST, fine only",
    "ssast-fshift_4_1": "SSAST, frame shift 4 → 1",
}
RECIPES = {
    "ast": HERE / "coarse_to_fine.yaml",
    "elastic": HERE / "coarse_to_fine_elastic.yaml",
    "hts_at": HERE.parent / "hts_at" / "fsdd.yaml",
    "ssast": HERE / "ssast_pretrain.yaml",
    "digit": HERE / "ssast_digit.yaml",
}


def experiments() -> list[Experiment]:
    """All runs: each setting with three seeds, and each of the AST's with each speaker left out.

    Settings change fastest, so that what is compared was trained under the same conditions.
    """
    official = [Experiment(kind, seed) for seed in range(SEEDS) for kind in AST]
    left_out = [
        Experiment(kind, number % SEEDS, speaker)
        for number, speaker in enumerate(SPEAKERS)
        for kind in AST
    ]
    others = [Experiment(kind, s) for s in range(SEEDS) for kind in BEYOND | OTHERS]
    return official + left_out + others


def fine_tuning(run: Experiment) -> Experiment:
    """What follows a pre-training."""
    return Experiment(f"digit-{run.kind}", run.seed)


def train_one(run: Experiment, root: Path, runs: Path) -> None:
    """Trains an experiment; SSAST is pre-trained and then learns the digits."""
    family, setting = run.kind.split("-")
    train(run, RECIPES[family], ["--setting", setting], root, runs)
    if family == "ssast":
        options = ["--model.init", str(runs / run.name)]
        train(fine_tuning(run), RECIPES["digit"], options, root, runs)


def measure(run: Experiment, root: Path, runs: Path) -> dict:
    """Test accuracy of a trained run, and what each of its epochs took."""
    from fastast.train import RunDirectory, evaluate_over, load_data, load_model

    labelled = fine_tuning(run) if run.kind.startswith("ssast") else run
    method, recipe, _ = load_model(runs / labelled.name)
    recipe.data.root = str(root)
    test = load_data(recipe.data, ["test"]).test
    (score,) = evaluate_over(method, recipe, test, compression=[1.0])["compression"]
    epochs = RunDirectory(runs / run.name).metrics("epoch")
    return asdict(run) | {
        "test_accuracy": score["accuracy"],
        "test_clips": score["clips"],
        "phase": [epoch["phase"] for epoch in epochs],
        "flops": [epoch["flops"] for epoch in epochs],
        "seconds": [round(epoch["seconds"], 3) for epoch in epochs],
        "validation_accuracy": [epoch["validation_accuracy"] for epoch in epochs],
    }


def baseline_of(kind: str) -> str:
    """What runs of a kind are compared with: the family's own."""
    return f"{kind.partition('-')[0]}-baseline"


class Comparison:
    """Runs of one setting beside the baselines with the same seed and speaker.

    Args:
        results: of all runs.
        kind: the setting.
        baseline: its baseline.
        left_out: those with a speaker left out, or those of the official split.
    """

    def __init__(self, results: list[dict], kind: str, baseline: str, left_out: bool) -> None:
        def select(kind: str) -> dict:
            return {
                (run["seed"], run["leave_out"]): run
                for run in results
                if run["kind"] == kind and (run["leave_out"] is not None) == left_out
            }

        runs, baselines = select(kind), select(baseline)
        self.pairs = [(runs[key], baselines[key]) for key in sorted(runs, key=str)]
        self.accuracy = np.array([100 * run["test_accuracy"] for run, _ in self.pairs])
        reference = np.array([100 * other["test_accuracy"] for _, other in self.pairs])
        self.delta = self.accuracy - reference
        self.flops = np.array([sum(run["flops"]) for run, _ in self.pairs])

    def saved(self, cost: str) -> np.ndarray:
        """Percent of the baseline's cost that whole runs save."""
        return np.array(
            [100 * (1 - sum(run[cost]) / sum(other[cost])) for run, other in self.pairs]
        )

    def saved_when_better(self, cost: str) -> np.ndarray:
        """The same up to the first epoch of the last phase that is better on validation than the
        baseline's best, which counts up to that; of the runs that come so far."""
        saved = []
        for run, other in self.pairs:
            best = int(np.argmax(other["validation_accuracy"]))
            goal = other["validation_accuracy"][best]
            better = [
                epoch
                for epoch, accuracy in enumerate(run["validation_accuracy"])
                if run["phase"][epoch] == run["phase"][-1] and accuracy > goal
            ]
            if better:
                spent = sum(run[cost][: better[0] + 1])
                saved.append(100 * (1 - spent / sum(other[cost][: best + 1])))
        return np.array(saved)


def signed(values: np.ndarray) -> str:
    """As :func:`spread`, with the sign of the mean."""
    text = spread(values)
    return text if text.startswith("-") and values.mean().round(2) < 0 else f"+{text.lstrip('-')}"


def comparison_table(runs: list[dict], names: dict[str, str], left_out: bool = False) -> str:
    """A row for each setting."""
    rows = []
    for kind, label in names.items():
        baseline = baseline_of(kind)
        found = Comparison(runs, kind, baseline, left_out)
        cells = [""] * 3
        if kind != baseline:
            cells = [signed(found.delta), spread(found.saved("flops"), 1)]
            cells.append(spread(found.saved("seconds"), 1))
        rows.append([label, spread(found.accuracy), *cells])
    header = ["setting", "test accuracy", "difference", "FLOPs saved, %", "time saved, %"]
    return table(header, rows)


def report(results: dict) -> None:
    """Writes the page and its figure."""
    runs, machine = results["runs"], results["run"]["machine"]
    longest = max(sum(run["seconds"]) for run in runs)

    rows = []
    for kind, label in AST.items():
        if kind in (BASELINE, "ast-avg_pool_2"):
            continue
        found = Comparison(runs, kind, BASELINE, left_out=False)
        flops = found.saved_when_better("flops")
        cells = [spread(flops, 1), spread(found.saved_when_better("seconds"), 1)]
        rows.append([label, f"{len(flops)} of {len(found.pairs)}", *cells])
    sooner = table(["setting", "runs", "FLOPs saved, %", "time saved, %"], rows)

    PAGE.write_text(f"""# From coarse to fine on spoken digits

Generated by `recipes/fsdd/coarse_to_fine.py` from
`bench/results/cpu/fsdd_coarse_to_fine.json`; do not edit. What the settings mean:
[coarse_to_fine.md](coarse_to_fine.md).

Free Spoken Digit Dataset, ten digits; accuracy in percent, mean and standard deviation over runs,
differences and savings from the baseline of the same seed and speaker. {machine["cpu"]}, one thread
a run, {longest / 60:.1f} minutes the longest; torch {results["run"]["versions"]["torch"]}, commit
{results["run"]["commit"][:12]}, {results["run"]["date"][:10]}. The machine had other work to do, so
times spread more than they would on a quiet one, most of all ElasticAST's. Validation is not
counted.

Learning rate and lengths were chosen on a validation split cut from the official training set (410
clips), with one seed. The baseline has 30 epochs; 40 did no better there, 20 did worse. Each run
keeps the weights of its best epoch on validation, and reads the test set once, with these.

## Official split

300 test clips, {SEEDS} seeds. Savings are those of whole runs.

{comparison_table(runs, AST)}

## A speaker never heard

The test set is the 500 clips of one speaker, of whom training hears nothing; each of six speakers
once. The standard deviation is therefore that of speakers, and what matters is the difference.

{comparison_table(runs, AST, left_out=True)}

![Accuracy over compute](figures/{FIGURE.name})

## When first better

The paper's table 2 stops at the first epoch that is better than the baseline's best, and counts the
baseline up to that. Here on validation, official split; of the runs that were better at any time.
With a learning rate that falls to zero most of what a phase gains comes at its end, and 410 clips
tell few models apart at 99 %, so whole runs say more.

{sooner}

## Beyond the paper

An ElasticAST of the same size on clips of their own lengths, official split, {SEEDS} seeds; all but
the baseline have 22 epochs. The optimiser's running means go on from phase to phase; the frame
shift falls by the same ratio from each epoch to the next; each clip draws one of four frame shifts
anew in each epoch.

{comparison_table(runs, BEYOND)}

## HTS-AT and SSAST

Official split, {SEEDS} seeds; each against its own baseline. SSAST is pre-trained without labels,
in phases or not, and then learns the digits in the same way; savings are those of pre-training.

{comparison_table(runs, OTHERS)}
""")
    _draw(runs)
    print(f"Wrote {PAGE.relative_to(REPOSITORY)} and {FIGURE.relative_to(REPOSITORY)}")


def _draw(runs: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = ("fshift", "avg_pool", "max_pool", "patch_bl", "patch_pi")
    markers = {"_4_2_1": "^", "_4_1": "o", "_2_1": "s"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True)
    for axis, left_out in zip(axes, (False, True), strict=True):
        for index, (kind, label) in enumerate(AST.items()):
            found = Comparison(runs, kind, BASELINE, left_out)
            reference = Comparison(runs, BASELINE, BASELINE, left_out)
            compute = 100 * (found.flops / reference.flops).mean()
            setting = kind.removeprefix("ast-")
            colour = next((f"C{n}" for n, m in enumerate(methods) if setting.startswith(m)), "k")
            marker = next((m for end, m in markers.items() if setting.endswith(end)), "*")
            if kind == "ast-avg_pool_2":
                colour, marker = "C1", "D"
            error = found.delta.std(ddof=1) if kind != BASELINE else None
            axis.errorbar(
                # Side by side where they cost the same.
                compute + (kind != BASELINE) * 0.4 * (index % 6 - 2.5),
                found.delta.mean(),
                error,
                fmt=marker,
                color=colour,
                capsize=2,
                elinewidth=0.8,
                label=label,
            )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_xlabel("training FLOPs (% of the baseline's)")
        axis.set_title("a speaker never heard" if left_out else "official split", fontsize=10)
    axes[0].set_ylabel("accuracy above the baseline (points)")
    axes[1].legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    """Trains what is missing, measures everything, and writes the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder of the recordings")
    parser.add_argument("--runs", type=Path, default=Path("runs/fsdd_coarse_to_fine"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.report:
        if options.root is None:
            parser.error("--root is missing: the folder that holds FSDD's recordings")
        options.runs.mkdir(parents=True, exist_ok=True)
        todo = experiments()
        side_by_side(options.jobs, lambda run: train_one(run, options.root, options.runs), todo)
        from bench.results import current_run

        run = current_run("cpu")
        measured = [measure(run, options.root, options.runs) for run in todo]
        lines = ",\n ".join(json.dumps(row) for row in measured)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(f'{{"run": {json.dumps(run)},\n"runs": [\n {lines}\n]}}\n')
    report(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()

"""``fastast report``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastast.cli.options import parser_of
from fastast.train.curves import axes_of, curve_table, metric_of
from fastast.train.report import (
    evaluated_curves,
    read_runs,
    results_table,
    savings_table,
    settings_table,
    shared_folder,
    write_report,
)


def main(argv: list[str]) -> None:
    """Prints the comparison and writes report.md and its figures."""
    parser = parser_of("report")
    parser.add_argument(
        "runs", type=str, nargs="+", help="run directories, the one to compare with first"
    )
    parser.add_argument(
        "--out", type=str, help="folder to write to; default: the one that all runs lie in"
    )
    options = parser.parse_args(argv)

    runs = read_runs(options.runs)
    console = Console()
    console.print(_table(results_table(runs)))
    if savings := savings_table(runs):
        console.print(_table(savings, f"saved over {runs[0].name}, when first better or else best"))
        converged = savings_table(runs, converged=True)
        console.print(_table(converged, f"saved over {runs[0].name}, at the best epoch"))
    models = evaluated_curves(runs)
    for axis in axes_of(models):
        console.print(_table(curve_table(models, axis), metric_of(models)))
    settings = settings_table(runs)
    if len(settings) > 1:
        console.print(_table(settings))
    path = write_report(runs, options.out or shared_folder(options.runs))
    print(f"Wrote {path} and its figures")


def _table(rows: list[list[str]], title: str | None = None) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    return table

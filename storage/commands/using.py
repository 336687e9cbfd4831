"""Using what a run holds: `export`, `diff`, `merge`, `probe`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from storage.commands.common import AsJson, Quiet, print_written
from storage.errors import UserError
from storage.screen.console import Console, Text
from storage.screen.terminal import amount, echo, echo_json


def export(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL, or a part.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="npz, parquet, safetensors or csv.")],
    field: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="The vectors, such as query_token_representation. [default: answers alone]",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="N[,N…]", help="Layer of a token representation, or several: 0,14.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A new file. [default: answers.FORMAT or FIELD.FORMAT]", show_default=False),
    ] = None,
    escape_formulas: Annotated[
        bool,
        typer.Option("--escape-formulas", help="Of a CSV for a spreadsheet: write ' before cells that it would compute."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one field's vectors, or the answers, into a file of another format. A file that exists is not replaced.

    Example: storage export output/ --to npz --field query_token_representation --layer 21
    """
    from storage.reading.export import FORMATS
    from storage.reading.export import export as write

    if to not in FORMATS:
        raise UserError(f"--to {to}: the formats are {', '.join(FORMATS)}")
    if layer is not None and field is None:
        raise UserError("--layer needs --field, as in: --field query_token_representation --layer 21")
    progress = not quiet and sys.stderr.isatty()
    written = write(source, to, field, _layers(layer), output, escape_formulas=escape_formulas, progress=progress)
    print_written("file", str(written), as_json, quiet)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A run's output directory or URL, or a part.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    rows: Annotated[int, typer.Option(min=1, help="Questions in each table.")] = 10,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare two runs question by question. Exit code 0: the same questions, answers and vectors; 1: they differ.

    Example: storage diff output/ output-exact/
    """
    from storage.reading.diff import compare, difference_tables

    difference = compare(first, second, progress=not quiet and sys.stderr.isatty())
    if as_json:
        echo_json({"same": difference.same, **asdict(difference)})
    elif not quiet:
        console = Console()
        for table in difference_tables(difference, rows):
            console.print(table)
        echo("the same" if difference.same else "different")
    raise SystemExit(0 if difference.same else 1)


def merge(
    runs: Annotated[list[str], typer.Argument(metavar="A B…", help="Finished runs: their output directories or URLs.")],
    output_dir: Annotated[str, typer.Option(help="The new directory.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make one run of the parts of several, such as the shards of a table; those stay as they are.

    The parts are linked, or copied where that cannot be. They are verified before the directory gets its name.

    Example: storage merge shard-1/ shard-2/ --output-dir output/
    """
    from storage.runs.merge import merge as merge_runs

    with Console(stderr=True, quiet=quiet or as_json).status(Text("reading the runs")) as status:
        merged = merge_runs(runs, output_dir, lambda phase: status.update(Text(phase)))
    run, account = merged.run, merged.account
    if as_json:
        echo_json({"directory": run.location, "newly_merged": merged.newly, **asdict(account)})
    elif not quiet:
        failed = f", {account.failed:,} failed" if account.failed else ""
        done = "merged" if merged.newly else "merged before"
        parts = amount(account.parts_planned, "part")
        echo(f"{amount(account.planned, 'question')}{failed} in {parts}, {done}: {run.location}")


def probe(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL, or one with parts.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Which answers are wrong: question_id and a column of true and false; with model_answer, only answers "
            "that are the run's count. [default: those that differ from the ground truth]",
            show_default=False,
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The column that says an answer is wrong. "
            "[default: is_hallucinating_manual, or the only one of true and false]",
            show_default=False,
        ),
    ] = None,
    keep_mismatches: Annotated[
        bool, typer.Option("--keep-mismatches", help="Keep labels that were given to another answer than the run's.")
    ] = False,
    split: Annotated[
        Literal["grouped", "published"],
        typer.Option(help="By image, 60/20/20; or 80/20 as the HALP scripts split, an image on both sides."),
    ] = "grouped",
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Also score the best probes for each value of a column.")
    ] = None,
    mlp: Annotated[bool, typer.Option("--mlp/--no-mlp", help="Train the published MLP too, or the linear probe alone.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the MLP and the intervals.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The figure: .svg, .png or .pdf. [default: DIR/probe.svg]", show_default=False),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well each representation and layer predicts that an answer is wrong; write probe.json and a figure to DIR.

    Example: storage probe output/ --labels qwen25vl_manually_reviewed.csv --by answer_type
    """
    from storage.probing.experiment import ProbeSettings, run_experiment
    from storage.probing.figure import write_results
    from storage.probing.report import closing_lines, experiment_json, report_lines, report_tables

    settings = ProbeSettings(
        labels=labels,
        label_column=label_column,
        keep_mismatches=keep_mismatches,
        split=split,
        probes=("linear", "mlp") if mlp else ("linear",),
        by=by,
        seed=seed,
    )
    with Console(stderr=True, quiet=quiet).status(Text("reading the parts")) as status:
        experiment = run_experiment(directory, settings, show=lambda field: status.update(Text(f"probing {field}")))
    found = experiment_json(experiment)
    body = json.dumps(found, indent=1)
    if as_json:  # before it is written: a prefix may be for reading alone
        echo_json(found, indent=1)
        write_results(experiment, body, plot)
        return
    console = Console(quiet=quiet)
    for line in report_lines(experiment):
        console.print(line, highlight=False, soft_wrap=True)
    for table in report_tables(experiment):
        console.print(table)
    for line in closing_lines(experiment):
        console.print(line, highlight=False, soft_wrap=True)
    figure = write_results(experiment, body, plot)
    console.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def _layers(text: str | None) -> int | list[int] | None:
    """Return one layer, or several that stand between commas."""
    if text is None:
        return None
    layers = text.split(",")
    if not all(layer.strip().isdecimal() for layer in layers):
        raise UserError(f"--layer {text}: a layer is a number from 0 on, several stand between commas, as in: --layer 0,14")
    return int(text) if len(layers) == 1 else [int(layer) for layer in layers]

"""`storage`: look into parts, check a run, probe it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from storage.errors import DamagedError, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look into HDF5 parts, check runs, probe them.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A part.")],
    question: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The question to show whole. [default: the first]", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Questions in the table.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show a part's metadata, its questions, and one question's shapes, dtypes and statistics.

    Example: storage inspect output/qwen25vl_7b_embeddings_part_001.h5 --question 17
    """
    from storage.inspect import describe_part, part_json, part_tables

    summary = describe_part(file, question)
    if as_json:
        print(json.dumps(part_json(summary)))
        return
    console = Console()
    for table in part_tables(summary, rows):
        console.print(table)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's output directory.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check every stored vector's checksum, and the texts against the plan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that every planned question is accounted for exactly once and every vector is whole. Exit code 1 if not.

    Example: storage verify output/ --deep
    """
    from storage.account import Bookkeeper
    from storage.repair import repair_command
    from storage.run import Run
    from storage.verify import verify as findings_of

    run = Run.open(directory)
    findings = list(findings_of(run, deep=deep))
    account = Bookkeeper(run).account()
    if as_json:
        print(json.dumps({"ok": not findings, **asdict(account), "findings": [asdict(f) for f in findings]}))
    else:
        for finding in findings:
            print(finding, file=sys.stderr)
        if any(finding.part is not None for finding in findings):
            print(f"To compute the damaged parts again: {repair_command(run)}", file=sys.stderr)
        verdict = f"{len(findings)} problems" if findings else "no problem found"
        print(f"{account.planned:,} planned = {account.written:,} written + {account.failed:,} failed"
              f" + {account.planned - account.written - account.failed:,} not published; {verdict}")  # fmt: skip
    raise SystemExit(1 if findings else 0)


@app.command()
def probe(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's output directory, or one with parts.")],
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
    mlp: Annotated[
        bool, typer.Option("--mlp/--no-mlp", help="Train the published MLP too, or the linear probe alone.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the MLP and the intervals.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The figure: .svg, .png or .pdf. [default: DIR/probe.svg]", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well each representation and layer predicts that an answer is wrong; write probe.json and a figure to DIR.

    Example: storage probe output/ --labels qwen25vl_manually_reviewed.csv --by answer_type
    """
    from storage.probing.experiment import ProbeSettings, run_experiment
    from storage.probing.figure import draw
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
    with Console(stderr=True).status("reading the parts") as status:
        experiment = run_experiment(directory, settings, show=lambda field: status.update(f"probing {field}"))
    draw(experiment, plot or directory / "probe.svg")
    body = json.dumps(experiment_json(experiment), indent=1)
    (directory / "probe.json").write_text(body + "\n", encoding="utf-8")
    if as_json:
        print(body)
        return
    console = Console()
    for line in report_lines(experiment):
        console.print(line, highlight=False, soft_wrap=True)
    for table in report_tables(experiment):
        console.print(table)
    for line in closing_lines(experiment):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"figure: {plot or directory / 'probe.svg'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    try:
        app()
    except (UserError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""`storage`: look into parts, and check a run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import Console

from storage.errors import DamagedError, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look into HDF5 parts and check runs.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A part: a file, or a URL such as s3://bucket/run/part.h5.")
    ],
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
    from storage.store import local_file

    with local_file(file) as path:
        summary = replace(describe_part(path, question), file=file)
    if as_json:
        print(json.dumps(part_json(summary)))
        return
    console = Console()
    for table in part_tables(summary, rows):
        console.print(table)


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL.")],
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
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html into a run's directory: counts, failures, charts and samples in one page. The collector does, too.

    Example: storage report output/
    """
    from storage.report import write_report
    from storage.run import Run

    address = write_report(Run.open(directory))
    print(json.dumps({"report": address}) if as_json else address)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    try:
        app()
    except (UserError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

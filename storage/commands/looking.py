"""Looking at a run or a part: `inspect`, `verify`, `report`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from storage.commands.common import AsJson, Quiet, print_written
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import echo, echo_json, one_line


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|DIR",
            help="A part, or a run's output directory; or the URL of either (s3://bucket/run).",
        ),
    ],
    question: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The question to show whole. [default: the first of a part]", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Questions in a part's table.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw norms by layer and main components into a new file.")
    ] = None,
    colour_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A column that colours the plot, such as finish_reason.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a part with one question's shapes, dtypes and statistics; or a whole run: settings, counts, norms, drift.

    Example: storage inspect output/ --question 17
    """
    if colour_by is not None and plot is None:
        raise UserError("--colour-by needs --plot, as in: --plot run.png")
    from storage.reading.source import is_home
    from storage.stores.store import local_file
    from storage.views.inspect import describe_part, find_question, part_json, part_tables
    from storage.views.overview import overview, overview_tables
    from storage.views.plot import plot as draw

    whole = None
    if question is not None and is_home(file):
        if plot is not None:
            raise UserError("--plot draws a whole part or run: leave --question out")
        file = find_question(file, question)
    if is_home(file):
        whole = overview(file, progress=sys.stderr.isatty())
        body, tables = asdict(whole), overview_tables(whole)
    else:
        with local_file(file) as path:
            summary = replace(describe_part(path, question), file=file)
        body, tables = part_json(summary), part_tables(summary, rows)
    if plot is not None:
        draw(file, whole or overview(file), colour_by, plot)
    if as_json:
        echo_json(body)
        return
    console = Console()
    for table in tables:
        console.print(table)


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check every stored vector's checksum, and the texts against the plan.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that every planned question is accounted for exactly once and every vector is whole.

    Exit code 1: something is wrong. 3: nothing is found wrong, but a part could not be looked at (its disk or network).

    Example: storage verify output/ --deep
    """
    from storage.runs.account import Bookkeeper
    from storage.runs.repair import repair_command
    from storage.runs.run import Run
    from storage.runs.verify import verify as findings_of

    run = Run.open(directory)
    findings = list(findings_of(run, deep=deep))
    account = Bookkeeper(run).account()
    if as_json:
        echo_json({"ok": not findings, **asdict(account), "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            echo(one_line(str(finding)), err=True)
        if any(finding.part is not None for finding in findings):
            echo(f"To {'merge' if run.settings.merged else 'compute'} the damaged parts again: {repair_command(run)}", err=True)
        verdict = f"{len(findings)} problems" if findings else "no problem found"
        if not quiet:
            echo(f"{account.planned:,} planned = {account.written:,} written + {account.failed:,} failed"
                 f" + {account.planned - account.written - account.failed:,} not published; {verdict}")  # fmt: skip
    raise SystemExit((3 if all(finding.unread for finding in findings) else 1) if findings else 0)


def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A run's output directory or URL.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html into a run's directory: counts, failures, charts and samples in one page. The collector does, too.

    Example: storage report output/
    """
    from storage.runs.run import Run
    from storage.stores.space import describe
    from storage.views.report import write_report

    run = Run.open(directory)
    try:
        address = write_report(run)
    except OSError as error:
        raise UserError(f"cannot write the report: {describe(error, run.location)}") from None
    print_written("report", address, as_json, quiet)

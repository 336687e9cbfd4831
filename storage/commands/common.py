"""What several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from storage.screen.terminal import echo, echo_json

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def print_written(kind: str, address: str, as_json: bool, quiet: bool) -> None:
    """Say where a file was written."""
    if as_json:
        echo_json({kind: address})
    elif not quiet:
        echo(address)

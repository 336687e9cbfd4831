"""`storage`: look into parts, check a run, probe it."""

from __future__ import annotations

import typer

from storage.command_line import Version, run_command
from storage.commands import looking, using

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look into HDF5 parts, check runs, probe them.",
)


@app.callback()
def _every_command(version: Version = False) -> None:
    pass


for command in (looking.inspect, looking.verify, looking.report, using.export, using.diff, using.merge, using.probe):
    app.command()(command)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    run_command(app)


if __name__ == "__main__":
    main()

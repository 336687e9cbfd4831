"""`producer`: plan runs, feed them, show how far they are, or do everything on this machine."""

from __future__ import annotations

import typer

from producer.commands import feeding, here, looking
from storage.command_line import Version, run_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Plan a run over a VQA dataset, queue it for the workers, and see how far it is.",
)


@app.callback()
def _every_command(version: Version = False) -> None:
    pass


for command in (feeding.enqueue, here.run, looking.check, looking.status, feeding.retry, feeding.cancel, here.demo):
    app.command()(command)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    run_command(app)


if __name__ == "__main__":
    main()

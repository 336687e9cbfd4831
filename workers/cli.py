"""`workers`: thin wrappers over the Celery command line. Each prints the command that it becomes, then becomes it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from storage.command_line import Version, child_environment, run_command
from storage.errors import UserError
from storage.screen.console import Console
from storage.screen.terminal import echo, echo_json, one_line
from storage.stores.location import is_url, join_roots, resolve_location
from workers.checkpoint.hub import cache_of
from workers.checkpoint.identity import local_directory
from workers.engine.interface import EngineSpec
from workers.process.gpus import chosen_gpus
from workers.process.parent import die_with_named_parent
from workers.process.per_gpu import run_workers

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="GPU workers, the collector, and Flower. Arguments after `--` go to Celery as they are.",
)
_THIS_MACHINE = {"127.0.0.1", "::1", "localhost"}
_SAVE_INTERVAL = 300_000  # milliseconds; Flower shows nothing new while it saves
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": False}
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print what fails only.")]
LogLevel = Annotated[str, typer.Option("--loglevel", "-l", help="Celery's log level.")]


@app.callback()
def _every_command(version: Version = False) -> None:
    pass


@app.command(context_settings=_PASS_ON)
def extract(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Model to preload: a hub name or a directory. [HALP_MODEL]")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model. [HALP_REVISION]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32. [HALP_DTYPE]")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where a hub model is kept. [HALP_CACHE_DIR]")] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Questions in a batch. [HALP_MAX_BATCH_SIZE, default: 128 on a GPU, 32 on a CPU]"),
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option(min=0, help="Retries of a question after transient errors. [HALP_MAX_RETRIES]")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Task threads; by default twice --max-batch-size.")] = None,
    data_root: Annotated[
        list[str] | None,
        typer.Option(help="Directory or URL that runs may lie in; repeatable. [HALP_DATA_ROOTS, default: here]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Worker name, unique on this machine. [default: extract-PID]")] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="Run one worker on each of these GPUs: `all`, or numbers as in 0,2. [default: one worker]"),
    ] = None,
    loglevel: LogLevel = "INFO",
) -> None:
    """Serve one model: load it, then consume questions. One worker uses one GPU; --gpus runs one on each of several.

    Example: workers extract --gpus all --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    _set_environment(
        MODEL=model, REVISION=revision, DTYPE=dtype, CACHE_DIR=cache_dir, MAX_BATCH_SIZE=max_batch_size,
        MAX_RETRIES=max_retries,
    )  # fmt: skip
    _set_roots(data_root)
    from workers.queue.app import served_queues
    from workers.settings import settings

    if gpus is not None:
        if name is not None:
            raise UserError("--gpus names the workers by their GPU: leave out --name")
        served_queues(settings())  # a mistake is said once, and not by each worker
        threads = () if concurrency is None else ("--concurrency", str(concurrency))
        arguments = [*threads, "--loglevel", loglevel, *(["--", *context.args] if context.args else [])]
        raise SystemExit(run_workers(chosen_gpus(gpus), arguments))

    node = _node(name or f"extract-{os.getpid()}")
    queues = [f"{served.prefix}.*" for served in served_queues(settings())]
    number = concurrency or 2 * settings().batch_size
    _become_celery(
        "worker", "--pool", "threads", "--concurrency", str(number), "--hostname", node, "--queues", ",".join(queues),
        "--without-gossip", "--without-mingle", "--loglevel", loglevel, *context.args,
    )  # fmt: skip


@app.command(context_settings=_PASS_ON)
def collect(
    context: typer.Context,
    directory: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIR]...", help="Directories and URLs to look for runs in. [HALP_DATA_ROOTS, default: here]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Worker name, unique on this machine. [default: collect-PID]")] = None,
    loglevel: LogLevel = "INFO",
) -> None:
    """Pack finished questions into HDF5 parts and keep the queue fed. One is enough; several do no harm.

    Example: workers collect /data/runs
    """
    _set_roots(directory)
    from workers.queue.queues import COLLECT
    from workers.settings import settings

    settings()  # a faulty variable is named here, and not in a traceback of Celery's

    node = _node(name or f"collect-{os.getpid()}")
    _become_celery(
        "worker", "--pool", "threads", "--concurrency", "1", "--hostname", node, "--queues", COLLECT,
        "--without-gossip", "--without-mingle", "--loglevel", loglevel, *context.args,
        heaps=1,
    )  # fmt: skip


@app.command(context_settings=_PASS_ON)
def flower(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5555,
    address: Annotated[str, typer.Option(help="Address to listen on; others than this machine need a password.")] = (
        "127.0.0.1"
    ),
    basic_auth: Annotated[
        str | None, typer.Option(metavar="USER:PASSWORD", help="Ask for these. [FLOWER_BASIC_AUTH, which `ps` hides]")
    ] = None,
    db: Annotated[Path | None, typer.Option(help="File to keep the tasks in over restarts. [default: memory only]")] = None,
    max_tasks: Annotated[int, typer.Option(min=1, help="Tasks to remember; 6 to 8 KB each.")] = 20_000,
) -> None:
    """Show tasks, retries and workers in a browser. Read-only, and on this machine alone unless told otherwise.

    Example: workers flower --port 5555
    """
    if basic_auth is not None:
        os.environ["FLOWER_BASIC_AUTH"] = basic_auth  # not as an argument, which every user of the machine can see
    protected = bool(os.environ.get("FLOWER_BASIC_AUTH")) or any("auth" in argument for argument in context.args)
    if address not in _THIS_MACHINE and not protected:
        raise UserError(
            f"--address {address} would show questions and file names to the network: set FLOWER_BASIC_AUTH=user:password"
        )
    kept = [] if db is None else ["--persistent=True", f"--db={db}", f"--state_save_interval={_SAVE_INTERVAL}"]
    _become_celery(
        "flower", f"--conf={Path(__file__).parent / 'monitor' / 'flowerconfig.py'}", f"--address={address}", f"--port={port}",
        f"--max_tasks={max_tasks}", *kept, *context.args,
    )  # fmt: skip


@app.command()
def health(
    name: Annotated[str | None, typer.Option(help="Look at this worker only, as it was named with --name.")] = None,
    without_broker: Annotated[
        bool, typer.Option("--without-broker", help="Leave the broker out: to start a worker again mends no Redis.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say whether the workers and collectors of this user on this machine live and work. Exit code 1 if one does not.

    Example: workers health
    """
    from workers.monitor.health import check_of_broker, checks_of_processes
    from workers.monitor.presence import present_here
    from workers.queue.feed import broker_trouble
    from workers.settings import settings

    here = present_here(settings().runtime_dir)
    chosen = [presence for presence in here if name in (None, presence.name.partition("@")[0])]
    if without_broker:
        found = checks_of_processes(chosen, settings())
    else:
        found = [check_of_broker(broker_trouble()), *checks_of_processes(chosen, settings())]
    healthy = all(check.healthy for check in found)
    if as_json:
        echo_json({"healthy": healthy, "checks": [asdict(check) for check in found]})
    else:
        for check in found if not quiet else [check for check in found if not check.healthy]:
            echo(one_line(f"{'ok     ' if check.healthy else 'FAILING'} {check.name}: {check.text}"))
    raise SystemExit(0 if healthy else 1)


@app.command()
def selfcheck(
    model: Annotated[str, typer.Option(help="Model to check: a hub name or a directory.")],
    revision: Annotated[str, typer.Option(help="Revision of a hub model.")] = "main",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where a hub model is kept. [default: ./model_cache, or the hub's cache where that has it]",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Questions to ask in place of the bundled ones; needs --images-dir.")
    ] = None,
    images_dir: Annotated[Path | None, typer.Option(help="Directory that the table's image ids are relative to.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions to ask, at most; 30 are bundled.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Length of an answer.")] = 32,
    dtype: Annotated[Literal["both", "float32", "bfloat16"], typer.Option(help="What to compute in.")] = "both",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare the engine with a plain forward and `generate`, on these weights and this machine. Exit code 1 if they differ.

    Example: workers selfcheck --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    if (table is None) != (images_dir is None):
        raise UserError("--csv and --images-dir go together: the table names the images in the directory")
    local_directory(model)
    dtypes = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    with TemporaryDirectory() as folder:
        from workers.checks.questions import alike, bundled, given

        if table and images_dir:
            cases = alike(given(table, images_dir, questions), Path(folder))
        else:
            cases = bundled(Path(folder), questions)
        from workers.checks.selfcheck import check

        verdicts = [
            check(
                EngineSpec("model", model, revision, name, cache_of(model, revision, cache_dir)),
                cases,
                max_new_tokens,
                lambda line: None if quiet else echo(line, err=True),
            )
            for name in dtypes
        ]
    from workers.checks.report import as_json as report
    from workers.checks.report import summary, verdict_table

    if as_json:
        echo_json(report(model, verdicts))
    else:
        console = Console()
        for verdict in verdicts if not quiet else [verdict for verdict in verdicts if not verdict.passes]:
            console.print(summary(verdict), highlight=False, soft_wrap=True)
            if verdict.checked_layers:
                console.print(verdict_table(verdict))
    raise SystemExit(0 if all(verdict.passes for verdict in verdicts) else 1)


def _set_environment(**values: object) -> None:
    for name, value in values.items():
        if value is not None:
            os.environ[f"HALP_{name}"] = str(value)


def _set_roots(locations: list[str] | None) -> None:
    if missing := [place for place in locations or [] if not is_url(place) and not Path(place).is_dir()]:
        raise UserError(f"no such directory: {', '.join(missing)}")
    if locations:
        os.environ["HALP_DATA_ROOTS"] = join_roots(map(resolve_location, locations))


def _node(name: str) -> str:
    """Return the name of a worker in its cluster. Celery would expand `%h` in it, and files are called after it."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise UserError(f"--name {name!r}: use letters, digits and `._-` alone, up to 100")
    return f"{name}@{socket.gethostname()}"


def _become_celery(*arguments: str, heaps: int = 2) -> None:
    # glibc keeps a heap for each few of a process's threads, and what is freed in one serves no other: over 12,000 questions
    # a worker grew from 129 to 162 MB, and went on. With two heaps it stayed at 136. A collector packs in its task's thread and
    # in its sweeps': with two heaps it grows by 20 MB whenever the other one comes to pack for the first time.
    os.environ.setdefault("MALLOC_ARENA_MAX", str(heaps))
    command = [sys.executable, "-P", "-m", "workers.launch", "-A", "workers", *arguments]
    echo(shlex.join(["celery", *command[4:]]), err=True)
    os.execve(command[0], command, child_environment(os.environ))


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    die_with_named_parent()
    run_command(app)


if __name__ == "__main__":
    main()

"""Runs from Python: what the commands do, with exceptions in place of exit codes. For notebooks and scripts.

Options are those of `producer run` under their own names: `max_new_tokens=0`, `layers=[7, 14]`, `columns={"question": "text"}`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tqdm.auto import tqdm

from producer.enqueueing import CancelledMeanwhileError, enqueue_run
from producer.local.machine import RunStoppedError, run_locally
from producer.options import RunOptions, option_defaults, run_options
from producer.planning import named_model, plan_run
from producer.resuming import Resumption
from producer.show.progress import Done, Phases, silent
from storage.errors import UserError
from storage.runs.account import Account, Bookkeeper
from storage.runs.run import Run
from storage.settings import faults
from workers.settings import settings

if TYPE_CHECKING:
    import pandas as pd

# What a run on this machine sets for the processes that it starts, and for itself.
_SET = ("HALP_BROKER_URL", "HALP_BROKER_URL_FILE", "HALP_DATA_ROOTS")


def run(
    table: str | os.PathLike[str] | pd.DataFrame,
    *,
    output_dir: str | os.PathLike[str] = "output",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Account:
    """Compute a run on this machine, as `producer run` does; return its account once it is finished.

    Args:
        table: a table's path, or a frame: columns as in docs/tables.md; images as paths, or as bytes.
        output_dir: where the parts go. The same call resumes what is there.
        cache_dir: where a hub model is kept.
        progress: show a bar.
        options: those of `producer run`.

    Raises:
        UserError: a mistake in the call or the table, with every faulty row; a model that cannot be loaded.
        RunStoppedError: a process kept dying. What is finished is kept.
        KeyboardInterrupt: the kernel was interrupted, or the run cancelled; the same call resumes.
    """
    asked = _options(table, output_dir, options)
    resumption = Resumption.of(asked.output_dir)
    with _phases(shown=progress) as phases:
        planned = plan_run(asked, phases)
    with _environment_kept(), _bar(planned, shown=progress) as show:
        cache = None if cache_dir is None else Path(cache_dir)
        return run_locally(planned, resumption, model=named_model(asked.model), cache_dir=cache, show=show)


def enqueue(
    table: str | os.PathLike[str] | pd.DataFrame,
    *,
    output_dir: str | os.PathLike[str] = "output",
    progress: bool = True,
    **options: Any,
) -> Account:
    """Plan a run and put its questions into the queue, as `producer enqueue` does; return its account.

    Workers elsewhere compute it: `status` says how far it is. Arguments as `run` has them. Raises UserError.
    """
    asked = _options(table, output_dir, options)
    with _phases(shown=progress) as phases:
        try:
            return enqueue_run(asked, phases).account
        except CancelledMeanwhileError as error:
            raise UserError(str(error)) from None


def status(output_dir: str | os.PathLike[str]) -> Account:
    """Return a run's account: every planned question is written, failed, staged or outstanding. Raises UserError."""
    return Bookkeeper(Run.open(os.fspath(output_dir))).account()


def _options(table: Any, output_dir: str | os.PathLike[str], given: Mapping[str, Any]) -> RunOptions:
    """Return what was asked for. Raises UserError for an option that there is not, or a value that it does not take."""
    values = option_defaults()
    for name in given:
        if name not in values or name in ("table", "vqa_dataset", "output_dir"):
            near = get_close_matches(name, values, 1)
            raise UserError(f"there is no option {name!r}" + (f": did you mean {near[0]}?" if near else ""))
    is_path = isinstance(table, (str, os.PathLike))
    values |= {name: _as_typed(name, value) for name, value in given.items()}
    values |= {"table": Path(table) if is_path else Path("frame"), "output_dir": os.fspath(output_dir)}
    try:
        options = run_options(**values)
    except ValidationError as error:
        raise UserError(faults(error)) from None
    if is_path:
        return options
    return replace(options, source=replace(options.source, frame=table))


def _as_typed(name: str, value: Any) -> Any:
    """Return a value as the command line has it."""
    if name == "layers" and isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    if name == "layers" and isinstance(value, int):
        return str(value)
    if name == "columns" and isinstance(value, Mapping):
        return [f"{role}={column}" for role, column in value.items()]
    if name == "image_root" and isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    if name == "chat_template" and value is not None:
        return Path(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _phases(*, shown: bool) -> Iterator[Phases]:
    """Show a bar for each phase of planning."""
    if not shown:
        yield silent
        return
    bars: list[Any] = []

    def begin(name: str, whole: int) -> Done:
        for bar in bars:
            bar.close()
        bars[:] = [tqdm(total=whole, desc=name, leave=False)]

        def done(number: int) -> None:
            bars[0].update(number - bars[0].n)

        return done

    try:
        yield begin
    finally:
        for bar in bars:
            bar.close()


@contextmanager
def _bar(run: Run, *, shown: bool) -> Iterator[Callable[[Account], None]]:
    """Show how many questions are finished."""
    with tqdm(total=sum(piece.size for piece in run.slices), desc="questions", unit="question", disable=not shown) as bar:

        def show(account: Account) -> None:
            bar.total = account.planned
            bar.set_postfix({"failed": account.failed} if account.failed else {}, refresh=False)
            bar.update(account.written + account.failed + account.staged - bar.n)

        yield show


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Give this process its own settings back: the next call is none of the run's processes."""
    before = {name: os.environ.get(name) for name in _SET}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        settings.cache_clear()


__all__ = ["Account", "RunStoppedError", "UserError", "enqueue", "run", "status"]

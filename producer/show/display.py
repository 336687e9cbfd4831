"""How a run looks on the terminal: its account, its workers, its failures as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.padding import Padding

from storage.runs.account import Account
from storage.runs.failures import Failed
from storage.runs.run import Run
from storage.screen.tables import WIDE, Name, Sentence, Table
from storage.screen.terminal import duration

if TYPE_CHECKING:
    from workers.monitor.presence import Presence

# Of the workers' table, with the width of the terminal from which on each is shown; the last two are of GPUs.
_WORKER_COLUMNS = (
    ("worker", 0),
    ("state", 0),
    ("model", 160),
    ("on", WIDE),
    ("last heard of", 0),
    ("questions", 0),
    ("per batch", 120),
    ("per prefix", 120),
    ("certificates", 140),
    ("GPU memory", 140),
    ("GPU busy", 0),
)
_NAMES = {"worker", "model", "on"}  # which may be long, and are cut


def account_table(run: Run, account: Account) -> Table:
    """Return the account as a table: N planned = N written + N failed + N staged + N outstanding."""
    table = Table(run.location, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name in ("planned", "written", "failed", "staged", "outstanding"):
        table.add_row(name, f"{getattr(account, name):,}")
    table.add_row("parts", f"{account.parts_published:,} of {account.parts_planned:,}")
    if run.is_cancelled():
        table.add_row("cancelled", "the command that it was begun with resumes it")
    for reason, number in account.reasons.items():
        table.add_row(f"failed: {reason}", f"{number:,}")
    return table


def workers_table(workers: Sequence[Presence]) -> Table:
    """Return who serves a run: what each is, when it was last heard of, what it has done; of GPUs, how they are used."""
    on_gpus = any(worker.gpu_memory_total for worker in workers)
    table = Table(what="workers")
    columns = _WORKER_COLUMNS[: None if on_gpus else -2]
    for name, wide in columns:
        table.column(name, wide=wide)
    for worker in workers:
        cells = worker_cells(worker)
        table.row(Name(cells[name]) if name in _NAMES else cells[name] for name, _ in columns)
    return table


def worker_cells(worker: Presence) -> dict[str, str]:
    """Return what is told of a worker, by the columns' names."""
    used, total, busy = worker.gpu_memory_used, worker.gpu_memory_total, worker.gpu_busy
    return {
        "worker": worker.name,
        "state": worker.state,
        "model": f"{worker.model} ({worker.dtype}{', whole prompts' if worker.whole else ''})",
        "on": worker.gpu or worker.device,
        "last heard of": f"{duration(max(0.0, time.time() - worker.seen))} ago",
        "questions": f"{worker.done:,}",
        "per batch": _ratio(worker.computed, worker.batches),
        "per prefix": _ratio(worker.computed, worker.prefixes),
        "certificates": f"{worker.exact_seconds / worker.engine_seconds:.0%} of time" if worker.engine_seconds else "",
        "GPU memory": f"{used / 1e9:.1f} of {total / 1e9:.1f} GB" if used is not None and total else "",
        "GPU busy": "" if busy is None else f"{busy:.0%}",
    }


def tried_again(run_id: str, workers: Sequence[Presence]) -> str:
    """Say how many of a run's questions wait for another attempt, and why the last one failed; nothing where none waits."""
    number = sum(worker.retrying.get(run_id, 0) for worker in workers)
    why = next((worker.again[run_id] for worker in workers if run_id in worker.again), "")
    return f"{number:,} tried again {why}".rstrip() if number else ""


def _ratio(number: int, of: int) -> str:
    return f"{number / of:.1f}" if of else ""


def account_json(run: Run, account: Account) -> dict[str, Any]:
    """Return the account as a script reads it."""
    return {
        "output_dir": run.location,
        "run_id": run.run_id,
        **asdict(account),
        "finished": account.finished,
        "cancelled": run.is_cancelled(),
        "refusals": run.refusals(),
    }


def failed_list(run: Run, failures: list[Failed]) -> Iterator[RenderableType]:
    """Yield failures, each with its message over the whole width: a column of a table would be too narrow for it."""
    yield Table(run.location, f"{len(failures):,} failed")
    for failed in failures:
        f = failed.failure
        part = f"part {failed.part}" if failed.published else f"part {failed.part}, not published yet"
        attempts = "1 attempt" if f.attempts == 1 else f"{f.attempts} attempts"
        yield Name(f"{f.question_id} · {f.reason}")
        yield Padding(Sentence(f.message), (0, 0, 0, 2))
        yield Padding(Sentence(f"{attempts}, {part}, {f.time}, {f.worker}"), (0, 0, 0, 2), style="dim")


def failed_json(failed: Failed) -> dict[str, Any]:
    """Return a failure as a script reads it."""
    place = {"image_id": failed.image_id, "part": failed.part, "published": failed.published}
    return {**asdict(failed.failure), **place}

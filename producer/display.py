"""How a run looks on the terminal: its account, its workers, its failures as tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from storage.account import Account
from storage.console import Text
from storage.failures import Failed
from storage.run import Run

if TYPE_CHECKING:
    from workers.presence import Presence


def account_table(run: Run, account: Account) -> Table:
    """Return the account as a table: N planned = N written + N failed + N staged + N outstanding."""
    table = Table(title=run.location, title_justify="left", show_header=False)
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
    columns = ["worker", "state", "model", "on", "last heard of", "questions", "per batch", "per prefix"]
    on_gpus = any(worker.gpu_memory_total for worker in workers)
    table = Table(*columns, *(["GPU memory", "GPU busy"] if on_gpus else []), title="workers", title_justify="left")
    now = time.time()
    for worker in workers:
        cells = [
            worker.name,
            worker.state,
            f"{worker.model} ({worker.dtype})",
            worker.gpu or worker.device,
            f"{max(0.0, now - worker.seen):.0f} s ago",
            f"{worker.done:,}",
            _ratio(worker.computed, worker.batches),
            _ratio(worker.computed, worker.prefixes),
        ]
        if on_gpus:
            used, total, busy = worker.gpu_memory_used, worker.gpu_memory_total, worker.gpu_busy
            cells.append(f"{used / 1e9:.1f} of {total / 1e9:.1f} GB" if used is not None and total else "")
            cells.append("" if busy is None else f"{busy:.0%}")
        table.add_row(*map(Text, cells))
    return table


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


def failed_table(run: Run, failures: list[Failed]) -> Table:
    """Return failures as a table; nothing is cut off."""
    table = Table(title=f"{run.location}: {len(failures):,} failed", title_justify="left")
    for name in ("question", "reason", "message", "attempts", "worker", "time", "part"):
        table.add_column(name, overflow="fold", justify="right" if name == "attempts" else "left")
    for failed in failures:
        f = failed.failure
        part = str(failed.part) if failed.published else f"{failed.part}, not published yet"
        table.add_row(*map(Text, (f.question_id, f.reason, f.message, str(f.attempts), f.worker, f.time, part)))
    return table


def failed_json(failed: Failed) -> dict[str, Any]:
    """Return a failure as a script reads it."""
    place = {"image_id": failed.image_id, "part": failed.part, "published": failed.published}
    return {**asdict(failed.failure), **place}

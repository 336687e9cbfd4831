"""The page of a run as HTML, and what a browser may do with it. Whatever comes from outside is escaped."""

from __future__ import annotations

import secrets

from producer.show.board import Look
from producer.show.display import worker_cells
from storage.runs.run import Run
from storage.screen.terminal import visible
from storage.views.page import template
from storage.views.report_data import clipped

_PROBLEMS = 20  # shown
_NONCE = secrets.token_urlsafe(16)  # of our own script and style
POLICY = (
    f"default-src 'none'; script-src 'nonce-{_NONCE}'; style-src 'nonce-{_NONCE}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def render(run: Run, look: Look, known: str = "") -> bytes:
    """Return the page; without its samples where the browser has those: `known` is their digest."""
    workers = [worker_cells(worker) for worker in look.listeners.workers]
    page = template("status.html.jinja", "producer").render(
        nonce=_NONCE,
        title=run.location.rpartition("/")[2] or run.location,
        location=run.location,
        look=look,
        account=look.account,
        columns=[name for name in (workers[0] if workers else ()) if any(worker[name] for worker in workers)],
        workers=workers,
        problems=[clipped(problem) for problem in look.problems[:_PROBLEMS]],
        more_problems=len(look.problems[_PROBLEMS:]),
        failures=[(failed, clipped(failed.failure.question_id), clipped(failed.failure.message)) for failed in look.failures],
        shown=look.samples,
        with_samples=known != look.samples_digest,
    )
    return visible(page).encode()

"""Repairing a run: damaged parts are moved aside, so that the slice is computed again as if it had never been."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterator

from storage.errors import DamagedError
from storage.runs.plan import Slice
from storage.runs.run import Run, part_names
from storage.runs.verify import Finding, verify_slice

_ASIDE = ".run/damaged"


def repair(
    run: Run,
    looked_at: Callable[[int], object] = lambda _: None,
    unread: Callable[[Finding], object] = lambda _: None,
) -> dict[str, str]:
    """Move damaged parts and the sidecars of damaged or lost ones to `.run/damaged/`; return the parts with the reasons.

    `looked_at` is told how many parts have been, since every byte of them is read. `unread` is told of those that could not be
    looked at: they stay as they are.
    The part goes before its sidecar: a part without one would be described, and so declared sound, by the next collector.
    Killed in between, the next call finds the part gone and goes on.
    """
    published, present = run.parts_with_sidecar(), part_names(run.location)
    moved = {}
    for number, piece in enumerate(run.slices, start=1):
        name = run.part_name(piece.part)
        there = piece.part in published or name in present
        reasons = _reasons(run, piece, unread, described=piece.part in published) if there else iter(())
        if (reason := next(reasons, None)) is not None:
            _move_aside(run, name)
            _move_aside(run, run.sidecar_key(piece.part))
            moved[name] = reason
        looked_at(number)
    if any(not run.store.exists(run.sidecar_key(piece.part)) for piece in run.slices):
        run.withdraw_summary()  # else no collector looks at the run again
    return moved


def repair_command(run: Run) -> str:
    """Return the command that computes the damaged parts again. Other options must be those of the first call."""
    settings = run.settings_by()
    if settings.merged:
        return shlex.join(["storage", "merge", *(member.location for member in settings.merged), "--output-dir"]) + " …"
    images = [] if settings.embedded_images else ["--images-dir", settings.images.images_dir]
    return shlex.join(["producer", "enqueue", settings.dataset, *images, "--output-dir", run.location]) + " … --repair"


def _reasons(run: Run, piece: Slice, unread: Callable[[Finding], object], *, described: bool) -> Iterator[str]:
    try:
        for finding in verify_slice(run, piece, described=described):
            if finding.unread:
                unread(finding)
            elif finding.part is not None:
                yield str(finding)
    except DamagedError as error:
        yield str(error)  # what the sidecar said of the file is lost, and the file may be damaged too


def _move_aside(run: Run, key: str) -> None:
    run.store.move(key, f"{_ASIDE}/{secrets.token_hex(4)}-{key.rpartition('/')[2]}")

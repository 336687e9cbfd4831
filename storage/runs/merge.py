"""Merging: one run of the parts of several finished ones, which stay as they are.

A part is linked or copied bit by bit, under a new name and number. What it says of itself stays: the run that computed it, and
its number there. The merged run's plan says so of each part, and its sidecars carry the digests on. All of it is made in a
directory beside, verified there, and gets its name last: killed before that, the same call begins with what is there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from storage.errors import UserError
from storage.images.lookup import EMBEDDED
from storage.naming import part_name
from storage.runs.account import Account, Bookkeeper
from storage.runs.failures import FAILURES_FILE, failures_csv, published_failures
from storage.runs.mergeable import Members
from storage.runs.pack import Sidecar, read_sidecar
from storage.runs.plan import Slice, write_generation
from storage.runs.run import Run, is_run
from storage.runs.verify import verify
from storage.settings import Member, RunSettings
from storage.stores.location import is_url, resolve_location
from storage.stores.store import DirectoryStore, sync

# Another file system, one without hard links, or as many of a file as it takes.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_MAX_NAMED = 5
Phase = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged run."""

    run: Run
    account: Account
    newly: bool  # else it was there already


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a merged run, and the one that it is made of."""

    number: int
    member: Run
    slice: Slice


def merge(locations: Sequence[str], output_dir: str, phase: Phase = lambda _: None) -> Merged:
    """Make a directory a finished run of the parts of others; where it is that already, change nothing.

    `phase` is told what is being done. Raises UserError for runs that are not finished or not of one kind, for equal question
    ids, for parts that are not sound, and where something else lies there. Raises OSError.
    """
    location = resolve_location(output_dir)
    if is_url(location):
        raise UserError(f"--output-dir {output_dir}: an object store gives no name to many objects at once: name a directory")
    members = Members.open(locations)
    merging = _Merging(members, Path(location), phase)
    if is_run(location) and (run := Run.open(location)).run_id == merging.run_id:
        return Merged(run, Bookkeeper(run).account(), newly=False)
    if os.path.lexists(location) and (not os.path.isdir(location) or os.listdir(location)):
        raise UserError(f"--output-dir {output_dir} holds something else: choose another one")
    phase("comparing the questions")
    members.refuse_equal_ids()
    return merging.make()


class _Merging:
    """One merging of some runs."""

    def __init__(self, members: Members, output: Path, phase: Phase) -> None:
        self._members, self._output, self._phase = members, output, phase
        self._beside = output.parent / f".{output.name}.merging"

    @cached_property
    def _sidecars(self) -> dict[tuple[str, int], Sidecar]:
        return {(run.run_id, p.part): read_sidecar(run, p.part) for run in self._members.runs for p in run.slices}

    @cached_property
    def run_id(self) -> str:
        """The merged run's id: that of its parts' content, so that the same call is known again."""
        content = [(*key, sidecar.sha256) for key, sidecar in self._sidecars.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @cached_property
    def _generations(self) -> list[list[_Piece]]:
        """The merged plan: first all that plans questions for the first time, then retry by retry."""
        levels: dict[int, list[tuple[Run, Slice]]] = {0: []}
        for run in self._members.runs:
            for piece in run.slices:
                levels.setdefault(piece.generation if piece.is_retry else 0, []).append((run, piece))
        number, found = 0, []
        for _, level in sorted(levels.items()):
            found.append([_Piece(number + n, run, piece) for n, (run, piece) in enumerate(level, start=1)])
            number += len(level)
        return found

    @property
    def _pieces(self) -> Iterator[_Piece]:
        return (piece for generation in self._generations for piece in generation)

    def make(self) -> Merged:
        """Make it, verify it, and give it its name."""
        with _held(self._beside):
            shutil.rmtree(self._beside / ".run", ignore_errors=True)
            self._take_parts()
            run = Run.create(self._beside, self.settings)
            self._plan(run)
            self._describe(run)
            self._take_images(run)
            account = self._end(run)
            self._verify(run)
            try:
                os.rename(self._beside, self._output)
            except OSError as error:  # another command has made something there; or it is a mount point
                raise UserError(f"{self._beside} cannot be called {self._output}: {error.strerror}") from None
            sync(self._output.parent)
        return Merged(Run.open(self._output), account, newly=True)

    @cached_property
    def settings(self) -> RunSettings:
        """The merged run's."""
        runs = self._members.runs
        first, settings = runs[0].settings_by(), [run.settings_by() for run in runs]
        limits, tests = {s.limit for s in settings}, {s.test for s in settings}
        changes = {
            "run_id": self.run_id,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "software_version": version("halp-extractor"),
            "limit": limits.pop() if len(limits) == 1 else None,
            "test": tests == {True},
            "shard": None,
            "checkpoint_interval": max(s.checkpoint_interval for s in settings),
            "part_digits": max(3, len(str(sum(map(len, self._generations))))),
            "merged": tuple(member for run in runs for member in _members_of(run)),
        }
        return RunSettings.model_validate(first.model_dump() | changes)

    def _name(self, piece: _Piece) -> str:
        return part_name(self.settings.model_slug, piece.number, self.settings.part_digits)

    def _take_parts(self) -> None:
        """Link or copy the parts; keep those that an earlier call has taken."""
        names = {self._name(piece): piece for piece in self._pieces}
        for there in self._beside.iterdir():
            if there.name not in names and not there.is_dir():
                there.unlink()
        for done, (name, piece) in enumerate(names.items(), start=1):
            self._phase(f"taking part {done} of {len(names)}")
            target = self._beside / name
            with piece.member.local_part(piece.slice.part) as source:
                if target.exists() and target.stat().st_size == source.stat().st_size:
                    continue
                target.unlink(missing_ok=True)
                _take(piece.member, source, target)
        sync(self._beside)

    def _plan(self, run: Run) -> None:
        numbers = {(piece.member.run_id, piece.slice.part): piece.number for piece in self._pieces}
        for generation, pieces in enumerate(self._generations):
            bases = [[numbers[p.member.run_id, base] for base in p.slice.based_on] for p in pieces]
            write_generation(
                run.store,
                (piece.member.questions(piece.slice.part) for piece in pieces),
                generation=generation,
                first_part=pieces[0].number,
                based_on=bases if generation else (),
                origins=[p.slice.origin or (p.member.run_id, p.slice.part) for p in pieces],
                run_id=run.run_id,
            )
        run.refresh()

    def _describe(self, run: Run) -> None:
        """Write the sidecars, and what is known of the model."""
        for piece in self._pieces:
            sidecar = self._sidecars[piece.member.run_id, piece.slice.part]
            ours = replace(sidecar, part=piece.number, run_id=run.run_id, file=run.part_name(piece.number))
            run.store.put_new(run.sidecar_key(piece.number), json.dumps(asdict(ours), ensure_ascii=False, indent=1).encode())
        if (facts := self._members.facts()) is not None:
            run.pin_model(facts)

    def _take_images(self, run: Run) -> None:
        """Link or copy the images that lay in the runs' table."""
        if not run.settings.embedded_images:
            return
        self._phase("taking the images")
        images = self._beside / EMBEDDED
        images.mkdir(parents=True, exist_ok=True)
        for member in self._members.runs:
            for name in member.store.list(EMBEDDED):
                with member.store.local_copy(f"{EMBEDDED}/{name}") as source, suppress(FileExistsError):
                    _take(member, source, images / name)
        sync(images)

    def _end(self, run: Run) -> Account:
        account = Bookkeeper(run).account()
        if account.failed:
            run.store.put(FAILURES_FILE, failures_csv(published_failures(run)))
        run.write_summary({**asdict(account), "finished_at": datetime.now(UTC).isoformat(timespec="seconds")})
        return account

    def _verify(self, run: Run) -> None:
        """Raise UserError where `storage verify` would find something; then nothing is kept."""
        self._phase("verifying")
        if not (findings := list(verify(run))):
            return
        where = {run.part_name(p.number): p.member.store.address(p.member.part_name(p.slice.part)) for p in self._pieces}
        lines = [str(replace(finding, file=where.get(finding.file, finding.file))) for finding in findings]
        more = f"\n  and {len(lines) - _MAX_NAMED:,} more" if len(lines) > _MAX_NAMED else ""
        listed = "\n".join(f"  {line}" for line in lines[:_MAX_NAMED])
        shutil.rmtree(self._beside)
        raise UserError(f"nothing is merged, as not every part is sound:\n{listed}{more}")


def _members_of(run: Run) -> tuple[Member, ...]:
    now = run.settings_by()
    own = Member(run_id=run.run_id, location=run.location, shard=now.shard, limit=now.limit, test=now.test)
    return now.merged or (own,)


def _take(run: Run, source: Path, target: Path) -> None:
    """Give a run's file that is never changed another name, or where that cannot be its content. Raises OSError."""
    if isinstance(run.store, DirectoryStore):
        try:
            os.link(source, target, follow_symlinks=False)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    unfinished = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, unfinished)
    sync(unfinished)
    os.rename(unfinished, target)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a directory that this call makes or finds. Raises UserError where another call works on it."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another `storage merge` is at work on {directory}: wait for it, or stop it") from None
    except OSError as error:  # where the file system has no locks, a second call goes unnoticed
        if error.errno not in _NO_LOCKS:
            raise

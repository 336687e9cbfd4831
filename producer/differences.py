"""A run that lies where a command would begin one: the same run, the same one with its files elsewhere, or another one."""

from __future__ import annotations

from hashlib import sha256
from itertools import count
from typing import Any

from producer.command_line import command_line
from producer.local_state import begun_here, is_worked_on
from producer.options import RunOptions
from storage.computation import Computation
from storage.errors import UserError
from storage.hdf5.layout import open_part
from storage.hdf5.rows import read_rows
from storage.images.decoding import MAX_IMAGE_BYTES
from storage.images.lookup import OutsideRootError, read_image, resolve_image
from storage.question import DIGESTS, images_of
from storage.runs.run import Run, is_run, part_names
from storage.screen.terminal import echo, one_line
from storage.settings import RunSettings
from storage.stores.location import resolve_location
from workers.checkpoint.identity import former_digest

_MAX_SHOWN = 200  # characters of a setting in a message: a chat template has more
_PLACES = {"images_dir", "image_roots"}
_TABLE = {"dataset_sha256", "limit"}  # what a table that has grown differs in
_OF_THE_MODEL = {*Computation.model_fields, "model_digest"}  # what has to be computed again if it is another one
_COMPARED = 16  # images of a relocated run that are compared with what its questions were computed from


def refuse_differences(run: Run, settings: RunSettings, options: RunOptions | None = None) -> None:
    """Raise UserError where a run does not compute what the settings ask for. `options`: those that they are made of."""
    if members := run.settings.merged:
        places = ", ".join(member.location for member in members)
        raise UserError(
            f"{run.location} is merged of other runs ({places}): nothing is computed in it. Give the command of one of them, "
            "and merge them again into another --output-dir; or choose another one for a new run"
        )
    differing = _differences(run, settings)
    if not differing:
        return
    lines = "\n".join(
        f"  {_changed_files(run.settings, settings)}"
        if name == "model_digest"
        else f"  {_option(name)}: {_show(old)} in the run, {_show(new)} now"
        for name, (old, new) in differing.items()
    )
    if not differing.keys() - _PLACES:
        advice = "Were the images moved there? With --relocate the run goes on with them, if they are the same."
    elif differing.keys() == {"model_slug"}:
        name = run.settings.model_slug
        advice = f"Its parts are called after the model's directory: name it by a link called {name}."
    else:
        advice = "Use the same settings to finish it, or another --output-dir for a new run."
        if not differing.keys() - _TABLE:
            advice = f"Has the table got further questions? With --append they are computed too, in further parts.\n{advice}"
        if _is_unbegun(run):
            advice += "\nNothing of it is computed yet: after `producer cancel`, this command begins the new run in its place."
        elif options and differing.keys() & _OF_THE_MODEL and (beside := _command_beside(run, options)):
            advice = f"What the model must be asked for again is computed beside it:\n  {beside}\n{advice}"
    raise UserError(f"{run.location} holds a run with other settings:\n{lines}\n{advice}")


def _command_beside(run: Run, options: RunOptions) -> str | None:
    """Return the command that computes what is asked for in a directory of its own."""
    given = options.output_dir.rstrip("/")
    places = (f"{given}-{number}" for number in count(2))
    free = next(place for place in places if not is_run(at := resolve_location(place)) and not part_names(at))
    return command_line("run" if begun_here(run) else "enqueue", options, free)


def is_replaceable(output_dir: str, settings: RunSettings) -> bool:
    """Tell whether another run lies there that nothing is computed of and nobody works on."""
    location = resolve_location(output_dir)
    if not is_run(location):
        return False
    run = Run.open(location)
    if not _differences(run, settings) or not _is_unbegun(run):
        return False
    return run.is_cancelled() or (begun_here(run) and not is_worked_on(run))


def replace_unbegun(output_dir: str, settings: RunSettings) -> None:
    """Remove another run of which nothing is computed: one that `producer run` left behind, or that was cancelled."""
    if is_replaceable(output_dir, settings):
        run = Run.open(output_dir)
        run.discard()
        echo(
            one_line(f"{run.location}: nothing was computed of the run that was planned there; it is replaced."),
            err=True,
        )


def relocate(output_dir: str, settings: RunSettings) -> None:
    """Have a run go on with its images in another place. Raises UserError where it has others than before."""
    location = resolve_location(output_dir)
    if not is_run(location):
        raise UserError(f"--relocate: {output_dir} holds no run")
    run = Run.open(location)
    differing = _differences(run, settings)
    if not differing or differing.keys() - _PLACES:
        return  # there is nothing to do, or it is another run: which is refused with the rest
    _compare_images(run, settings)
    run.relocate(settings.images)


def _differences(run: Run, settings: RunSettings) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which they differ, but for where the same checkpoint lies."""
    differing = run.settings_by().differences(settings)
    if "model_digest" in differing and run.settings.model_digest == former_digest(settings.model, settings.revision):
        del differing["model_digest"]  # of a version to which every file of the directory counted
    if "model_digest" not in differing:
        differing.pop("model", None)
    return differing


def _is_unbegun(run: Run) -> bool:
    """Tell whether a run has no part and no finished question."""
    return not (
        run.parts_with_sidecar()
        or part_names(run.location)
        or any(run.staged(piece.part) for piece in run.slices if run.label(piece.part) in run.staging_directories())
    )


def _compare_images(run: Run, settings: RunSettings) -> None:
    """Raise UserError where an image is another one than a published question was computed from."""
    seen: set[str] = set()
    for number in sorted(run.parts_with_sidecar()):
        with run.local_part(number) as path, open_part(path) as part:
            rows = read_rows(part)
            columns = (rows.get("image_id", []), rows.get("image_sha256", []))  # of failures alone a part has neither
            for key, image_id, digest in zip(part.ids, *columns, strict=False):
                if len(seen) >= _COMPARED:
                    return
                for name, its in zip(images_of(image_id), (digest or "").split(DIGESTS)):
                    if name not in seen:
                        seen.add(name)
                        _compare_image(name, its, key, settings)


def _compare_image(image_id: str, digest: str, key: str, settings: RunSettings) -> None:
    try:
        place = resolve_image(image_id, settings.images_dir, settings.image_roots)
        data = read_image(place, MAX_IMAGE_BYTES)
    except (OSError, OutsideRootError):  # missing there: which the check of the images has told, or allowed
        return
    if sha256(data).hexdigest() != digest:
        raise UserError(
            f"--relocate: {place} is another image than question {key} was computed from: "
            "give the directory that has the run's images, or begin a new run in another --output-dir"
        )


def _changed_files(begun: RunSettings, now: RunSettings) -> str:
    """Say which files of a checkpoint are others than when a run began."""
    old, new = begun.model_files, now.model_files
    changed = [f"{name} is {'another one' if name in old and name in new else 'new' if name in new else 'gone'}"
               for name in sorted(old | new) if old.get(name) != new.get(name)]  # fmt: skip
    said = ", ".join(changed) if old and changed else f"digest {begun.model_digest} in the run, {now.model_digest} now"
    return f"the checkpoint's files: {said}"


def _option(name: str) -> str:
    return "the CSV's content (SHA-256)" if name == "dataset_sha256" else name


def _show(value: Any) -> str:
    if value is None:
        return "the default"
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}… (SHA-256 {sha256(text.encode()).hexdigest()[:12]})"

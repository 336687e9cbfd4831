"""Planning: from a table and options to a run directory, or to the same run again."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from producer.images import check_images
from producer.options import RunOptions
from producer.progress import Phases, counted, silent
from producer.selection import cut, order_by_image, select
from producer.table import file_sha256, read_questions
from storage.errors import UserError
from storage.location import resolve_location
from storage.naming import model_slug
from storage.plan import Question, write_generation
from storage.probe import Verdict, whose
from storage.repair import repair
from storage.run import Run, is_run, part_names
from storage.settings import RunSettings
from workers.checkpoint import checkpoint_digest, local_num_layers, resolve_layers


def plan_run(options: RunOptions, phases: Phases = silent) -> Run:
    """Check everything, then create the run, or open it where it was begun. Raises UserError before anything is written.

    The table and its images are checked when a run is resumed too: an unmounted directory must not fail what is left.
    """
    questions = select(read_questions(options.csv, phases), limit=options.limit, test=options.test)
    check_images(questions, options.images_dir, options.image_roots, allow_missing=options.allow_missing, phases=phases)
    if options.order == "image":
        questions = order_by_image(questions)
    settings = _settings(options, slices=-(-len(questions) // options.checkpoint_interval))
    if options.repair:
        _repair(options.output_dir, settings, phases)
    _refuse_other_content(options.output_dir, settings)
    try:
        run = Run.create(options.output_dir, settings)
        _refuse_differences(run, settings)  # another process may have created it in between
        if not run.slices:
            slices = cut(questions, options.checkpoint_interval)
            number = -(-len(questions) // options.checkpoint_interval)
            write_generation(run.store, counted(slices, phases("writing the plan", number), step=1), run_id=run.run_id)
    except OSError as error:
        raise UserError(f"--output-dir {options.output_dir} cannot be written: {error}") from error
    return run


def refuse_faults(options: RunOptions, questions: Sequence[Question]) -> None:
    """Raise UserError where `plan_run` would for other reasons than the table and its images. Writes nothing."""
    settings = _settings(options, slices=-(-len(questions) // options.checkpoint_interval))
    _refuse_other_content(options.output_dir, settings)


def _repair(output_dir: str, settings: RunSettings, phases: Phases = silent) -> None:
    run = Run.open(output_dir)
    _refuse_differences(run, settings)
    for name, reason in repair(run, phases("verifying parts", len(run.slices))).items():
        aside = run.store.address(".run/damaged")
        print(f"{name} will be computed again, its files are in {aside}: {reason}", file=sys.stderr)


def _settings(options: RunOptions, *, slices: int) -> RunSettings:
    _check_layers(options)
    model = options.model
    return RunSettings(
        run_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software_version=version("halp-extractor"),
        staged_identity=True,
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        revision=options.revision,
        model_digest=checkpoint_digest(model, options.revision),
        model_slug=model_slug(model),
        dtype=options.dtype,
        layers=options.layers,
        vision_encoder=options.vision_encoder,
        prompt=options.prompt,
        repetition_penalty=options.repetition_penalty,
        exact=options.exact,
        halp_compat=options.halp_compat,
        exif_rotation=options.exif_rotation,
        max_new_tokens=options.max_new_tokens,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        dataset=options.csv.name,
        dataset_sha256=file_sha256(options.csv),
        images_dir=resolve_location(options.images_dir),
        image_roots=tuple(map(resolve_location, options.image_roots)),
        order=options.order,
        limit=options.limit,
        test=options.test,
        checkpoint_interval=options.checkpoint_interval,
        # Room for as many parts again, which retries of failures may add: sorted names stay the plan's order.
        part_digits=max(3, len(str(2 * slices))),
    )


def _check_layers(options: RunOptions) -> None:
    number = local_num_layers(options.model)
    if number is not None:
        resolve_layers(options.layers, number)
    if options.min_pixels is not None and options.max_pixels is not None and options.min_pixels > options.max_pixels:
        raise UserError(f"--min-pixels {options.min_pixels} is above --max-pixels {options.max_pixels}")


def _refuse_other_content(output_dir: str, settings: RunSettings) -> None:
    """Raise UserError where the directory holds another run, or parts that are not this run's."""
    location = resolve_location(output_dir)
    parts = part_names(location)
    if not is_run(location):
        if parts:
            raise UserError(
                f"{output_dir} holds parts of something else ({_names(parts)}): choose another --output-dir"
            )
        return
    run = Run.open(output_dir)
    _refuse_differences(run, settings)
    own = {run.part_name(piece.part): piece.part for piece in run.slices}
    verdicts = {name: _whose(run, own[name]) if name in own else "foreign" for name in parts}
    if foreign := [name for name, verdict in verdicts.items() if verdict == "foreign"]:
        raise UserError(f"{output_dir} holds parts that are not this run's ({_names(foreign)}): move them elsewhere")
    if damaged := [name for name, verdict in verdicts.items() if verdict == "damaged"]:
        raise UserError(
            f"{output_dir} holds damaged parts of this run ({_names(damaged)}): the same `producer enqueue` with --repair "
            "moves them to .run/damaged and computes them again"
        )


def _whose(run: Run, part: int) -> Verdict:
    """Tell whose a file with a part's name is. A described one was ours: `storage verify` compares its content."""
    if run.store.exists(run.sidecar_key(part)):
        return "ours"
    with run.local_part(part) as path:
        return whose(path, run.run_id, part)


def _refuse_differences(run: Run, settings: RunSettings) -> None:
    differing = run.settings.differences(settings)
    if differing:
        lines = "\n".join(
            f"  {_option(name)}: {_show(old)} in the run, {_show(new)} now" for name, (old, new) in differing.items()
        )
        raise UserError(
            f"{run.location} holds a run with other settings:\n{lines}\n"
            "Use the same settings to finish it, or another --output-dir for a new run."
        )


def _option(name: str) -> str:
    return "the CSV's content (SHA-256)" if name == "dataset_sha256" else name


def _show(value: Any) -> str:
    return "the default" if value is None else str(value)


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

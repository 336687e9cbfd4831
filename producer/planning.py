"""Planning: from a table and options to a run directory, or to the same run again."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from producer.appending import append, as_before, new_questions
from producer.dataset.embedding import refuse_without_room, write_images
from producer.dataset.faults import short
from producer.dataset.images import OTHER_COLUMN, check_images, with_found_images
from producer.dataset.selection import cut, order_by_image, select
from producer.dataset.table import Table, read_table
from producer.differences import is_replaceable, refuse_differences, relocate, replace_unbegun
from producer.options import RunOptions
from producer.show.progress import Phases, counted, silent
from producer.wording import takes_columns
from storage.errors import UserError
from storage.fields import EVERY, widths
from storage.hdf5.identify import Verdict, identify_part
from storage.naming import model_slug, part_name
from storage.question import Question
from storage.runs.plan import write_generation
from storage.runs.repair import repair
from storage.runs.run import Run, is_run, part_names
from storage.runs.verify import Finding
from storage.sample import refuse_too_large
from storage.screen.terminal import amount, echo, one_line
from storage.settings import RunSettings
from storage.stores.location import is_url, resolve_location
from storage.stores.space import describe
from workers.checkpoint.families import SIZED, refuse_blind, refuse_without_image
from workers.checkpoint.files import check_files
from workers.checkpoint.identity import (
    checkpoint_digest,
    file_digests,
    local_directory,
    read_config,
    resolve_layers,
)
from workers.checkpoint.published import refuse_unpublished
from workers.checkpoint.shapes import shape_of
from workers.errors import EngineStartError
from workers.settings import settings as process_settings

_LONGEST_PATH, _LONGEST_KEY = 4095, 1024  # bytes of a path in Linux; of a key in S3
# Each is an attribute of every question, and HDF5 looks through all of them for each one: 20,000 take two minutes a question.
_MOST_COLUMNS = 2000
_ASIDE = 9  # characters that `--repair` puts before the name of a part that it moves aside


def plan_run(options: RunOptions, phases: Phases = silent) -> Run:
    """Check everything, then create the run, or open it where it was begun. Raises UserError before anything is written.

    The table and its images are checked when a run is resumed too: an unmounted directory must not fail what is left.
    """
    table = read_table(options.source, phases)
    if table.said:
        echo(one_line(f"{options.source.path.name}: {table.said}"), err=True)
    questions = select(table.questions, limit=options.limit, test=options.test, shard=options.shard)
    if names_files(options, table, questions):
        images_dir = images_dir_of(options)
        questions = list(with_found_images(questions, images_dir, options.image_roots, phases=phases))
        check_images(questions, images_dir, options.image_roots, allow_missing=options.allow_missing, phases=phases)
    if without := missing_images(options, questions):
        echo(one_line(f"{options.source.path.name}: {without}"), err=True)
    if options.order == "image":
        questions = order_by_image(questions)
    asked = _settings(options, table, questions)
    settings = as_before(options.output_dir, asked) if options.append else asked
    _refuse_unwritable(options, settings, len(table.questions[0].extra))
    images = {} if options.computation.blind else table.embedded_of(questions)
    refuse_without_room(options.output_dir, images)
    if options.relocate:
        relocate(options.output_dir, settings)
    if not options.append:
        replace_unbegun(options.output_dir, settings)
    if options.repair:
        _repair(options.output_dir, settings, phases)
    _refuse_other_content(options.output_dir, settings, options)
    try:
        run = Run.create(options.output_dir, settings)
        refuse_differences(run, settings, options)  # another process may have created it in between
        new = new_questions(run, questions) if options.append else []
        write_images(run, options.source, set(images), phases)
        if not run.slices:
            slices = cut(questions, options.checkpoint_interval)
            number = -(-len(questions) // options.checkpoint_interval)
            write_generation(run.store, counted(slices, phases("writing the plan", number), step=1), run_id=run.run_id)
        elif options.append:
            append(run, new, asked, phases)
    except OSError as error:
        raise UserError(f"--output-dir {describe(error, options.output_dir)}") from error
    return run


def names_files(options: RunOptions, table: Table, questions: Sequence[Question]) -> bool:
    """Tell whether a run opens files that its table names."""
    if options.computation.blind or table.embedded:
        return False
    return any(question.image_id or question.extra.get(OTHER_COLUMN) for question in questions)


def missing_images(options: RunOptions, questions: Sequence[Question]) -> str | None:
    """Say how many questions have no image, though they are asked with theirs; None where all have one."""
    number = 0 if options.computation.blind else sum(not question.image_id for question in questions)
    return f"{number:,} of {amount(len(questions), 'question')} have no image, and are asked without" if number else None


def images_dir_of(options: RunOptions) -> str:
    """Return where a table's images are that it names. Raises UserError where that is not said."""
    if options.images_dir is None:
        raise UserError(f"--images-dir is missing: {options.source.path} names files, so say what they are relative to")
    return options.images_dir


def refuse_faults(options: RunOptions, table: Table, questions: Sequence[Question]) -> None:
    """Raise UserError where `plan_run` would for other reasons than the table and its images. Writes nothing."""
    settings = _settings(options, table, questions)
    _refuse_unwritable(options, settings, len(table.questions[0].extra))
    if not is_replaceable(options.output_dir, settings):
        _refuse_other_content(options.output_dir, settings, options)


def _repair(output_dir: str, settings: RunSettings, phases: Phases = silent) -> None:
    run = Run.open(output_dir)
    refuse_differences(run, settings)

    def unread(finding: Finding) -> None:
        echo(one_line(f"{finding}; the part stays as it is"), err=True)

    for name, reason in repair(run, phases("verifying parts", len(run.slices)), unread).items():
        aside = run.store.address(".run/damaged")
        echo(f"{name} will be computed again, its files are in {aside}: {one_line(reason)}", err=True)


def _settings(options: RunOptions, table: Table, questions: Sequence[Question]) -> RunSettings:
    _refuse_not_utf8(options)
    _check_model(options, questions)
    slices = -(-len(questions) // options.checkpoint_interval)
    model = options.model
    return RunSettings(
        run_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software_version=version("halp-extractor"),
        staged_identity=True,
        model=named_model(options.model),
        revision=options.revision,
        model_digest=checkpoint_digest(model, options.revision),
        model_files=file_digests(model),
        model_slug=model_slug(model),
        **options.computation.options(),
        prompt_columns=takes_columns(options, questions),
        dataset=options.source.path.name,
        dataset_sha256=table.sha256,
        embedded_images=bool(table.embedded) and not options.computation.blind,
        images_dir=resolve_location(images_dir_of(options)) if names_files(options, table, questions) else "/",
        image_roots=tuple(map(resolve_location, options.image_roots)),
        columns=dict(options.source.columns),
        strip_placeholders=options.source.strip_placeholders,
        order=options.order,
        limit=options.limit,
        test=options.test,
        shard=None if options.shard is None else str(options.shard),
        checkpoint_interval=options.checkpoint_interval,
        # Room for as many parts again, which retries of failures may add: sorted names stay the plan's order.
        part_digits=max(3, len(str(2 * slices))),
    )


def _refuse_not_utf8(options: RunOptions) -> None:
    """Raise UserError where a setting cannot be written into run.json: Linux takes any bytes for a name."""
    roots = map(resolve_location, options.image_roots)
    for option, text in (
        ("the table", options.source.path.name), ("--images-dir", resolve_location(options.images_dir or "/")),
        ("--model", options.model),
        ("--model", named_model(options.model)), ("--revision", options.revision), ("--prompt", options.computation.prompt),
        *(("--image-root", root) for root in roots),
    ):  # fmt: skip
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{option} {text}: the name has bytes that are not UTF-8: give it another one") from None


def named_model(model: str) -> str:
    """Return a model as a run names it: a local directory by its whole path."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _check_model(options: RunOptions, questions: Sequence[Question]) -> None:
    if (directory := local_directory(options.model)) is not None:
        check_files(directory)  # else the run would be bound to files that must be replaced
    config = read_config(options.model, options.revision)
    if config is not None and config.model_type is not None and not process_settings().engine.startswith("fake"):
        try:
            refuse_blind(config.values)
        except EngineStartError as error:  # before a run is there that has the wrong model
            raise UserError(f"--model {options.model}: {error}") from None
        asked = options.computation
        if asked.halp_compat:
            refuse_unpublished(str(config.model_type))
        if asked.blind or not all(question.image_id for question in questions):
            refuse_without_image(str(config.model_type))
        if config.model_type not in SIZED and (asked.min_pixels is not None or asked.max_pixels is not None):
            raise UserError(
                f"--min-pixels and --max-pixels: a {config.model_type} model's own processor sizes images: leave them out"
            )
    if options.computation.halp_compat and (odd := next((q for q in questions if len(q.images) != 1), None)):
        what = f"{len(odd.images)} images" if odd.images else "no image"
        raise UserError(f"--halp-compat: question {short(odd.question_id)} has {what}: the published scripts take one")
    if config is not None and config.num_hidden_layers is not None:
        resolve_layers(options.computation.layers, config.num_hidden_layers)
    if EVERY in options.computation.answer_states and (shape := shape_of(options.model)) is not None:
        asked = options.computation
        layers = resolve_layers(asked.layers, shape.num_hidden_layers)
        sizes = widths(shape.hidden_size, shape.vision_hidden_size, layers, answer_states=asked.answer_states)
        refuse_too_large(sizes, asked)
    if (
        options.computation.min_pixels is not None
        and options.computation.max_pixels is not None
        and options.computation.min_pixels > options.computation.max_pixels
    ):
        raise UserError(f"--min-pixels {options.computation.min_pixels} is above --max-pixels {options.computation.max_pixels}")


def _refuse_unwritable(options: RunOptions, settings: RunSettings, columns: int) -> None:
    """Raise UserError where the parts of a new run could not be written: its questions would be computed, and wait for ever."""
    location = resolve_location(options.output_dir)
    if is_run(location) and not is_replaceable(options.output_dir, settings):
        return
    if columns > _MOST_COLUMNS:
        raise UserError(
            f"{options.source.path}: {columns:,} further columns, of which {_MOST_COLUMNS:,} can be kept: remove what no "
            "reader needs"
        )
    name = part_name(settings.model_slug, 0, settings.part_digits)
    longest = _longest_name(options.output_dir) - _ASIDE
    if len(name) > longest:
        raise UserError(
            f"--model {short(options.model)}: parts would be called {short(name)} and have names of {len(name)} characters, "
            f"of which {longest} can be written: give the model's directory a shorter name, or name a link to it"
        )
    room = (_LONGEST_KEY if is_url(location) else _LONGEST_PATH) - len("/.run/damaged/") - _ASIDE - len(name)
    if len(os.fsencode(location)) > room:
        raise UserError(
            f"--output-dir {short(options.output_dir)}: its path is too long for the parts in it: choose a shorter one"
        )


def _longest_name(output_dir: str) -> int:
    """Return how many bytes a file's name may have where a run will lie: 255 mostly, 143 where names are encrypted."""
    path = Path(resolve_location(output_dir)) if not is_url(output_dir) else Path("/")
    try:
        return os.pathconf(next(place for place in (path, *path.parents) if os.path.isdir(place)), "PC_NAME_MAX")
    except OSError:
        return 255


def _refuse_other_content(output_dir: str, settings: RunSettings, options: RunOptions | None = None) -> None:
    """Raise UserError where the directory holds another run, or parts that are not this run's."""
    location = resolve_location(output_dir)
    parts = part_names(location)
    if not is_run(location):
        if parts:
            raise UserError(f"{output_dir} holds parts of something else ({_names(parts)}): choose another --output-dir")
        return
    run = Run.open(output_dir)
    refuse_differences(run, settings, options)
    if parts and not run.slices:
        raise UserError(
            f"{run.store.address('.run/plan/000.json')}, the run's plan, is gone: put it back from a backup, or choose another "
            "--output-dir; parts that are written stay as they are"
        )
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
        return identify_part(path, run.run_id, part, run.slice(part).origin)


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

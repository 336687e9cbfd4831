"""The pre-flight check of a dataset: what `producer run` with the same options would meet, and about what it would cost."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from producer.check.findings import (
    Finding,
    answer_length,
    image_findings,
    long_prompts,
    table_findings,
    without_images,
)
from producer.check.survey import ImageSource, Survey, survey, survey_embedded, write_files
from producer.check.texts import Texts, look_at_texts
from producer.dataset.images import check_images, with_found_images
from producer.dataset.selection import order_by_image, select
from producer.dataset.table import Table, embedded_images, read_table
from producer.options import RunOptions
from producer.planning import images_dir_of, names_files, refuse_faults
from producer.show.progress import Phases, silent
from producer.wording import takes_columns
from storage.evenly import spread
from storage.fields import is_of_image, values_of, widths
from storage.question import Question
from storage.stores.location import is_url, resolve_location
from storage.wording import asked
from workers.checkpoint.hub import cache_of
from workers.checkpoint.identity import resolve_layers
from workers.checkpoint.shapes import Shape, shape_of
from workers.checks.trial import Trial, TrialCase, run_trial
from workers.engine.interface import EngineSpec
from workers.extract.preprocess import limits_of
from workers.settings import DEFAULT_MODEL, settings

_WHAT_IFS = (1280, 768, 512, 256)  # vision tokens of an image, as --max-pixels might bound them
# Bytes of a part per stored number and per question (names, texts, attributes): benchmarks/RESULTS.md, "Storage".
_BYTES_PER_NUMBER = {"bfloat16": 1.5, "float32": 3.7}
_BYTES_PER_QUESTION = 4_000


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What a bound on pixels would do: images that it shrinks, and vision tokens of all questions under it."""

    max_pixels: int
    shrunk_images: int
    vision_tokens: int


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a run would leave, at its peak in the staging area, and what is free there; an object store has no end."""

    parts: int
    staging: int
    images: int  # those that lie in the table
    free: int | None

    @property
    def needed(self) -> int:
        """All of it."""
        return self.parts + self.staging + self.images


@dataclass(frozen=True, slots=True)
class Checked:
    """All that the check found."""

    options: RunOptions
    questions: int
    images: int
    parts: int
    columns: str | None  # which was taken for what, where their names are not ours
    extra_columns: tuple[str, ...]
    without_answer: int
    texts: Texts
    turned: tuple[str, ...]  # images that are stored turned, by their EXIF data
    per_image: Counter[int]  # questions of an image to how many images have so many
    sizes: tuple[tuple[int, int], ...]  # of the good images
    tokens: tuple[int, ...]  # of the same images
    vision_tokens: int  # of all questions together
    file_bytes: int
    shape: Shape | None
    what_ifs: tuple[WhatIf, ...]
    disk: Disk | None
    decode_seconds: float | None
    trial: Trial | None
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0: nothing found. 1: something to look at, or questions that would fail. 2: the run would be refused."""
        return 2 if any(f.level == "refused" for f in self.findings) else int(bool(self.findings))

    @property
    def hours(self) -> float | None:
        """Hours of one such device for all questions, by the trial."""
        return None if self.trial is None else self.questions / self.trial.questions_per_second / 3600

    @property
    def decode_cores(self) -> float | None:
        """Cores that decoding keeps busy at the trial's speed."""
        if self.trial is None or self.decode_seconds is None:
            return None
        return self.trial.questions_per_second * self.images / self.questions * self.decode_seconds


def check(options: RunOptions, *, decode: bool, sample: int, cache_dir: Path | None, phases: Phases = silent) -> Checked:
    """Look at everything that a run with these options would use, and write nothing.

    Raises UserError where the run would be refused before its images are looked at.
    """
    table = read_table(options.source, phases)
    questions = select(table.questions, limit=options.limit, test=options.test, shard=options.shard)
    if names_files(options, table, questions):
        images_dir = images_dir_of(options)
        questions = list(with_found_images(questions, images_dir, options.image_roots, phases=phases))
        check_images(questions, images_dir, options.image_roots, allow_missing=True, phases=phases)
    refuse_faults(options, table, questions)
    with TemporaryDirectory(prefix="halp-check-") as scratch:  # for images that lie in the table, some at a time
        return _look(options, table, questions, scratch, decode=decode, sample=sample, cache_dir=cache_dir, phases=phases)


def _look(
    options: RunOptions, table: Table, questions: Sequence[Question], scratch: str, *,
    decode: bool, sample: int, cache_dir: Path | None, phases: Phases,
) -> Checked:  # fmt: skip
    shape = shape_of(options.model)
    files = names_files(options, table, questions)
    gallery = _gallery(options, images_dir_of(options) if files else scratch, shape or _default_shape())
    blind = options.computation.blind
    asked_of = Counter[str](() if blind else (image_id for question in questions for image_id in question.images))
    done = phases("opening images", len(asked_of))
    if table.embedded and not blind:
        images = embedded_images(options.source, set(asked_of), lambda _: None)
        seen = survey_embedded(gallery, images, decode=decode, done=done)
    else:
        seen = survey(gallery, list(asked_of), decode=decode, done=done)
    tokens = {i: number for i, size in seen.sizes.items() if (number := gallery.tokens(size)) is not None}
    embedded = 0 if blind else sum(table.embedded_of(questions).values())
    disk = _disk(options, shape, questions, embedded) if shape else None
    columns = takes_columns(options, questions)
    texts = look_at_texts(options, questions, columns=columns)
    findings = [
        *table_findings(questions),
        *without_images(options, questions),
        *image_findings(options, seen, asked_of),
        *long_prompts(questions, tokens, options.computation.prompt),
        *texts.findings(),
        *answer_length(shape, options.computation),
    ]
    if disk and disk.free is not None and disk.needed > disk.free:
        message = f"the run needs about {in_bytes(disk.needed)}; {in_bytes(disk.free)} are free"
        findings.append(Finding("look", "disk", 1, message))
    return Checked(
        options=options,
        questions=len(questions),
        images=len(asked_of),
        parts=-(-len(questions) // options.checkpoint_interval),
        columns=table.said,
        extra_columns=tuple(questions[0].extra),
        without_answer=sum(not question.ground_truth_answer for question in questions),
        texts=texts,
        turned=seen.turned,
        per_image=Counter(asked_of.values()),
        sizes=tuple(seen.sizes.values()),
        tokens=tuple(tokens.values()),
        vision_tokens=sum(tokens.get(image_id, 0) * number for image_id, number in asked_of.items()),
        file_bytes=seen.file_bytes,
        shape=shape,
        what_ifs=_what_ifs(gallery, seen, asked_of),
        disk=disk,
        decode_seconds=seen.decode_seconds,
        trial=_trial(options, table, gallery, questions, seen, sample, cache_dir) if sample else None,
        findings=tuple(sorted(findings, key=lambda finding: ("refused", "fails", "look").index(finding.level))),
    )


def _default_shape() -> Shape:
    shape = shape_of(DEFAULT_MODEL)
    assert shape is not None
    return shape


def _gallery(options: RunOptions, images_dir: str, shape: Shape) -> ImageSource:
    return ImageSource(
        images_dir=resolve_location(images_dir),
        roots=tuple(map(resolve_location, options.image_roots)),
        limits=limits_of((options.computation.min_pixels, options.computation.max_pixels), shape),
        factor=shape.factor,
        halp_compat=options.computation.halp_compat,
        exif_rotation=options.computation.exif_rotation,
    )


def _what_ifs(gallery: ImageSource, seen: Survey, asked: Counter[str]) -> tuple[WhatIf, ...]:
    found: list[WhatIf] = []
    least, most = gallery.limits
    if gallery.factor is None or least is None or most is None:
        return ()
    for bound in (most, *(tokens * gallery.factor**2 for tokens in _WHAT_IFS)):
        if not least <= bound <= most:
            continue
        shrunk = sum(width * height > bound for width, height in seen.sizes.values())
        tokens = sum((gallery.tokens(size, bound) or 0) * asked[image_id] for image_id, size in seen.sizes.items())
        if not found or (shrunk, tokens) != (found[-1].shrunk_images, found[-1].vision_tokens):
            found.append(WhatIf(bound, shrunk, tokens))
    return tuple(found)


def _disk(options: RunOptions, shape: Shape, asked: Sequence[Question], embedded: int) -> Disk:
    """Estimate the bytes of the parts. The questions of an image share its vectors, unless the file's order parts them."""
    asked_of = options.computation
    questions = len(asked)
    seeing = [] if asked_of.blind else [question.image_id for question in asked if question.image_id]
    found = widths(
        shape.hidden_size,
        shape.vision_hidden_size if asked_of.vision_encoder else None,
        resolve_layers(asked_of.layers, shape.num_hidden_layers),
        vision_only=shape.vision_hidden_size if asked_of.halp_compat else None,
        answer_states=asked_of.answer_states,
    )
    each, of_image = values_of(found, asked_of.max_new_tokens), sum(w for name, w in found.items() if is_of_image(name))
    # In compat mode the vision position moves with the question's length.
    shared = len(set(seeing)) if options.order == "image" and not asked_of.halp_compat else len(seeing)
    numbers = shared * of_image + questions * (each - of_image)
    width = 2 if asked_of.dtype == "bfloat16" else 4
    staged = min(questions, options.checkpoint_interval + settings().queue_limit)
    return Disk(
        parts=round(numbers * _BYTES_PER_NUMBER[asked_of.dtype]) + questions * _BYTES_PER_QUESTION,
        staging=staged * each * width,
        images=embedded,
        free=_free(options.output_dir),
    )


def _free(output_dir: str) -> int | None:
    if is_url(output_dir):
        return None
    path = Path(output_dir).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


def _trial(
    options: RunOptions,
    table: Table,
    gallery: ImageSource,
    questions: Sequence[Question],
    seen: Survey,
    sample: int,
    cache_dir: Path | None,
) -> Trial | None:
    """Run the engine on questions of images spread evenly over the dataset, each image with all of its questions.

    None where no question has images that can be opened.
    """
    blind = options.computation.blind
    by_image: dict[str, list[Question]] = {}
    for question in order_by_image(questions):
        if blind or all(image_id in seen.sizes for image_id in question.images):
            by_image.setdefault(question.image_id, []).append(question)
    if not by_image:
        return None
    groups = list(by_image.values())
    number = max(1, round(sample * len(groups) / sum(map(len, groups))))
    chosen = [question for group in spread(groups, number) for question in group][:sample]
    if table.embedded and not blind:
        images = {image_id for question in chosen for image_id in question.images}
        write_files(gallery.images_dir, embedded_images(options.source, images, lambda _: None))
    asked_of, own = options.computation, settings()
    columns = takes_columns(options, questions)
    cache = cache_of(options.model, options.revision, cache_dir)
    spec = EngineSpec(own.engine, options.model, options.revision, asked_of.dtype, cache, own.cudnn_attention)
    cases = [TrialCase(() if blind else q.images, asked(asked_of.prompt, q, columns=columns)) for q in chosen]
    return run_trial(spec, cases, (gallery.images_dir, gallery.roots), asked_of)


def in_bytes(number: float) -> str:
    """Return a number of bytes as text: `1.2 GB`."""
    power = min(4, int(math.log10(max(1, number))) // 3)
    return f"{number:.0f} bytes" if power == 0 else f"{number / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"

"""The images that a table names, looked for before anything is planned. It opens none of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from producer.dataset.faults import Faults, short
from producer.dataset.forms.row import image_names
from producer.dataset.nearby import describe_missing, describe_outside, is_web
from producer.show.progress import Phases, counted, silent
from storage.errors import UserError
from storage.images.lookup import OutsideRootError, resolve_image
from storage.question import Question, image_id_of, images_of
from storage.stores.location import is_url, is_within, resolve_location
from storage.stores.store import missing_objects

MAX_MISSING = 0.2  # share of the distinct images: more is a wrong directory rather than lost files
OTHER_COLUMN = "image_name"  # beside `image_id` in one table: COCO's number is in the one, the file in the other


def check_images(
    questions: Sequence[Question],
    images_dir: str | Path,
    image_roots: Sequence[str | Path] = (),
    *,
    allow_missing: bool = False,
    phases: Phases = silent,
) -> int:
    """Return how many of the distinct images are missing: each becomes a failure of its questions later.

    Raises UserError where a directory is none or an object store cannot be asked, where a row's image lies outside the
    directory and the further roots, and, unless `allow_missing`, where more than a fifth of the images are missing.
    """
    for option, directory in [("--images-dir", images_dir), *(("--image-root", root) for root in image_roots)]:
        # os.path here and below: Path's own tests raise on a name too long and on a parent that may not be entered.
        if not is_url(directory) and not os.path.isdir(directory):
            problem = "is not a directory" if os.path.exists(directory) else "does not exist"
            raise UserError(f"{option} {directory} {problem}: name the directory that holds the images")
    images_dir = resolve_location(images_dir)
    roots = [images_dir, *map(resolve_location, image_roots)]
    images = dict.fromkeys(image_id for question in questions for image_id in question.images)
    places: dict[str, str] = {}
    outside: dict[str, str] = {}
    for image_id in counted(images, phases("placing images", len(images))):
        try:
            places[image_id] = resolve_image(image_id, images_dir, roots)
        except OutsideRootError as e:
            outside[image_id] = f"{short(image_id)} is a URL: images are not fetched" if is_web(image_id) else str(e)
    if outside:
        raise UserError(_outside_message(questions, outside, images_dir))
    gone = _missing(counted(places.values(), phases("looking for images", len(places))), roots)
    missing = [image_id for image_id, place in places.items() if place in gone]
    if len(missing) > MAX_MISSING * len(images) and not allow_missing:
        raise UserError(
            f"{len(missing):,} of {len(images):,} images are missing in {images_dir}, such as "
            f"{', '.join(map(short, missing[:3]))}: is --images-dir right? --allow-missing runs anyway\n"
            f"{describe_missing(missing, images_dir)}"
        )
    return len(missing)


def with_found_images(
    questions: Sequence[Question],
    images_dir: str | Path,
    image_roots: Sequence[str | Path] = (),
    *,
    phases: Phases = silent,
) -> Sequence[Question]:
    """Return the questions by the column whose images are there, where a table has both `image_id` and `image_name`.

    That is `image_name` if more of its images are found than of `image_id`'s; the other column is carried along.
    """
    if not questions or OTHER_COLUMN not in questions[0].extra:
        return questions
    roots = [resolve_location(images_dir), *map(resolve_location, image_roots)]
    names = {image_id for question in questions for image_id in question.images}
    others = [image_id_of([str(name) for name in image_names(question.extra[OTHER_COLUMN])]) for question in questions]
    found = _found(names, roots, phases)
    better = found < len(names) or not names
    better = better and _found({name for other in others for name in images_of(other)}, roots, phases) > found
    faults = Faults()
    for q, other in zip(questions, others, strict=True):
        taken, left = (other, q.image_id) if better else (q.image_id, other)
        if left and not taken:
            where, column = f"data row {q.csv_row}, question {short(q.question_id)}", OTHER_COLUMN if better else "image_id"
            faults.add(f"{where}: {column} is empty, and images are named there: fill it in, or remove that column")
    if faults.number:
        raise UserError(f"{faults.number:,} rows name their image in the other column\n{faults}")
    if not better:
        return questions
    return [
        replace(q, image_id=other, extra=_carried(q.extra, OTHER_COLUMN, "image_id", q.image_id))
        for q, other in zip(questions, others, strict=True)
    ]


def _carried(extra: dict[str, str], name: str, other: str, value: str) -> dict[str, str]:
    """Return the further columns with one in another's place."""
    return {other if key == name else key: value if key == name else text for key, text in extra.items()}


def _found(image_ids: Iterable[str], roots: Sequence[str], phases: Phases) -> int:
    """Return how many of the distinct images are there."""
    places = set()
    distinct = dict.fromkeys(image_ids)
    for image_id in counted(distinct, phases("comparing the image columns", len(distinct))):
        with suppress(OutsideRootError):
            places.add(resolve_image(image_id, roots[0], roots))
    return len(places) - len(_missing(places, roots))


def _missing(places: Iterable[str], roots: Sequence[str]) -> set[str]:
    """Return those of some locations that have no file or object. An object store is asked once for all below a root."""
    gone: set[str] = set()
    below: dict[str, set[str]] = {}
    for place in places:
        if is_url(place):
            root = next(root for root in roots if is_within(place, root))
            below.setdefault(root, set()).add(place)
        elif not os.path.isfile(place):
            gone.add(place)
    for root, wanted in below.items():
        gone |= missing_objects(root, wanted)
    return gone


def _outside_message(questions: Sequence[Question], outside: dict[str, str], images_dir: str) -> str:
    faults = Faults()
    for question in questions:
        if left := [outside[image_id] for image_id in question.images if image_id in outside]:
            where = f"data row {question.csv_row}, question {short(question.question_id)}"
            faults.add(f"{where}: image {left[0]}")
    rows = "1 row names" if faults.number == 1 else f"{faults.number:,} rows name"
    cure = "download the images" if all(map(is_web, outside)) else "--image-root DIR admits a further root"
    nearby = describe_outside(list(outside), images_dir)
    return f"{rows} an image outside {images_dir}: {cure}\n{faults}{nearby}"

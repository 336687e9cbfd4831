"""The images that a table names, looked for before anything is planned. It opens none of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from producer.faults import Faults, short
from storage.errors import UserError
from storage.images import OutsideRootError, resolve_image
from storage.plan import Question

MAX_MISSING = 0.2  # share of the distinct images: more is a wrong directory rather than lost files


def check_images(
    questions: Sequence[Question], images_dir: Path, image_roots: Sequence[Path] = (), *, allow_missing: bool = False
) -> int:
    """Return how many of the distinct images are missing: each becomes a failure of its questions later.

    Raises UserError where a directory is none, where a row's image lies outside the directory and the further roots,
    and, unless `allow_missing`, where more than a fifth of the images are missing.
    """
    for option, directory in [("--images-dir", images_dir), *(("--image-root", root) for root in image_roots)]:
        # os.path here and below: Path's own tests raise on a name too long and on a parent that may not be entered.
        if not os.path.isdir(directory):
            problem = "is not a directory" if os.path.exists(directory) else "does not exist"
            raise UserError(f"{option} {directory} {problem}: name the directory that holds the images")
    images_dir, image_roots = images_dir.resolve(), [root.resolve() for root in image_roots]
    images = dict.fromkeys(question.image_id for question in questions)
    missing: list[str] = []
    outside: dict[str, str] = {}
    for image_id in images:
        try:
            path = resolve_image(image_id, images_dir, image_roots)
        except OutsideRootError as e:
            outside[image_id] = str(e)
        else:
            if not os.path.isfile(path):
                missing.append(image_id)
    if outside:
        raise UserError(_outside_message(questions, outside, images_dir))
    if len(missing) > MAX_MISSING * len(images) and not allow_missing:
        raise UserError(
            f"{len(missing):,} of {len(images):,} images are missing in {images_dir}, such as "
            f"{', '.join(map(short, missing[:3]))}: is --images-dir right? --allow-missing runs anyway"
        )
    return len(missing)


def _outside_message(questions: Sequence[Question], outside: dict[str, str], images_dir: Path) -> str:
    faults = Faults()
    for question in questions:
        if question.image_id in outside:
            where = f"data row {question.csv_row}, question {short(question.question_id)}"
            faults.add(f"{where}: image {outside[question.image_id]}")
    rows = "1 row names" if faults.number == 1 else f"{faults.number:,} rows name"
    return f"{rows} an image outside {images_dir}: --image-root DIR admits a further root\n{faults}"

"""A question: one row of a dataset, as a table gives it and a plan keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

DIGESTS = ", "  # between those of a question's images
MAX_IMAGES = 64  # of a question


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the dataset."""

    question_id: str
    # Path of the image relative to the images directory, as in the CSV; of several a list of them in JSON; of none "".
    image_id: str
    question: str
    ground_truth_answer: str
    csv_row: int  # number of the data row in the CSV, from 1
    extra: dict[str, str]  # the CSV's other columns

    @property
    def images(self) -> tuple[str, ...]:
        """The images that it is asked about, in their order."""
        return images_of(self.image_id)

    @property
    def lane_key(self) -> str:
        """What the questions that share their computation have in common."""
        return self.image_id or self.question_id


def images_of(image_id: str) -> tuple[str, ...]:
    """Return the images that an image id names: one, several as a JSON list of texts, none where it is empty."""
    if not image_id:
        return ()
    if image_id[0] + image_id[-1] == "[]":
        try:
            found = json.loads(image_id)
        except (ValueError, RecursionError):
            return (image_id,)
        if found and all(isinstance(one, str) for one in found):
            return tuple(found)
    return (image_id,)


def image_id_of(images: Sequence[str]) -> str:
    """Return the image id of some images: the inverse of `images_of`, also of an image that is called like a list."""
    if not images:
        return ""
    if len(images) == 1 and images_of(images[0]) == (images[0],):
        return images[0]
    return json.dumps(list(images), ensure_ascii=False)

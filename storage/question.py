"""A question: one row of a dataset, as a table gives it and a plan keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the dataset."""

    question_id: str
    image_id: str  # path of the image relative to the images directory, as in the CSV
    question: str
    ground_truth_answer: str
    csv_row: int  # number of the data row in the CSV, from 1
    extra: dict[str, str]  # the CSV's other columns

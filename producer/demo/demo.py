"""The demo: real questions about real images (easy-vqa), a small Qwen2.5-VL that learned to answer them, the whole way."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from producer.dataset.table import Source
from producer.demo.gallery import accuracy_table, gallery
from producer.options import RunOptions
from producer.planning import plan_run
from storage.answers import is_right
from storage.computation import Computation
from storage.errors import UserError
from storage.reading.load import load_frame
from storage.runs.run import Run
from storage.screen.console import Console
from storage.views.inspect import describe_part, part_tables
from workers.demo.easy_vqa import MODEL, EasyVqa, read_easy_vqa

_INTERVAL = 200
ANSWER_TYPE = "answer_type"


def plan_demo(output_dir: Path, number: int) -> Run:
    """Write the demo's CSV and plan its run. A demo that was begun goes on."""
    data = read_easy_vqa("test")
    if number > len(data.rows):
        raise UserError(f"--questions {number}: easy-vqa's test split has {len(data.rows)}")
    table = output_dir / "data" / "easy_vqa.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    _write_table(data, table, number)
    return plan_run(
        RunOptions(
            source=Source(table),
            images_dir=str(data.images_dir),
            output_dir=str(output_dir),
            image_roots=(),
            model=str(MODEL),
            revision="main",
            computation=Computation(layers="all", max_new_tokens=16),
            checkpoint_interval=_INTERVAL,
            order="image",
            limit=None,
            test=False,
            allow_missing=False,
        )
    )


def show_demo(run: Run) -> None:
    """Print what is in the first part, how many answers are right, and some of them beside their images."""
    console = Console()
    for table in part_tables(describe_part(run.part_path(1)), rows=5):
        console.print(table)
    answers = demo_answers(run)
    console.print(gallery(answers, Path(run.images.images_dir), pictures=console.is_terminal))
    console.print(accuracy_table(answers))
    size = sum(run.part_path(piece.part).stat().st_size for piece in run.slices)
    for line in (
        f"{len(run.slices)} parts, {size / 1e6:.1f} MB: {run.part_path(1)} …",
        f"Look further: storage inspect {run.part_path(1)}",
        f"Which vectors know that an answer is wrong? storage probe {run.output_dir} --by {ANSWER_TYPE}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def demo_answers(run: Run) -> pd.DataFrame:
    """Return the demo's questions in the CSV's order, with a column `right`."""
    frame = load_frame(run.output_dir, order="csv")
    right = [is_right(answer, truth) for answer, truth in zip(frame["answer"], frame["ground_truth_answer"])]
    return frame.assign(right=right)


def _write_table(data: EasyVqa, table: Path, number: int) -> None:
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image_id", "question", "answer", ANSWER_TYPE])
        for index, row in enumerate(data.rows[:number]):
            writer.writerow([f"easy-vqa-test-{index:05d}", row.image_id, row.question, row.answer, row.answer_type])

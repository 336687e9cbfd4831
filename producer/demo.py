"""The demo: real questions about real images (easy-vqa), a small Qwen2.5-VL built here, the whole way to the parts."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from producer.options import RunOptions
from producer.planning import plan_run
from storage.errors import UserError
from storage.inspect import describe_part, part_tables
from storage.run import Run
from storage.settings import QUESTION

_INTERVAL = 50
_MODEL_NAME = "Qwen2.5-VL-Small-Random"


def plan_demo(output_dir: Path, number: int) -> Run:
    """Write the demo's CSV, build its model and plan its run. A demo that was begun goes on."""
    split = _easy_vqa() / "data" / "test"
    data = output_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    table = data / "easy_vqa.csv"
    total = _write_table(split / "questions.json", table, number)
    if number > total:
        raise UserError(f"--questions {number}: easy-vqa's test split has {total}")
    model = data / _MODEL_NAME
    Console(stderr=True).print(f"building a small Qwen2.5-VL with random weights in {model}", highlight=False)
    subprocess.run([sys.executable, "-m", "workers.small_model", str(model)], check=True, stdout=subprocess.DEVNULL)
    return plan_run(
        RunOptions(
            csv=table,
            images_dir=str(split / "images"),
            output_dir=str(output_dir),
            image_roots=(),
            model=str(model),
            revision="main",
            dtype="bfloat16",
            layers=None,
            vision_encoder=True,
            prompt=QUESTION,
            repetition_penalty=None,
            exact=False,
            halp_compat=False,
            exif_rotation=False,
            max_new_tokens=16,
            min_pixels=None,
            max_pixels=None,
            checkpoint_interval=_INTERVAL,
            order="image",
            limit=None,
            test=False,
            allow_missing=False,
        )
    )


def show_part(run: Run) -> None:
    """Print where the parts are and what is in the first."""
    console = Console()
    for piece in run.slices:
        path = run.part_path(piece.part)
        console.print(f"{path}  {path.stat().st_size / 1e6:.2f} MB", highlight=False, soft_wrap=True)
    for table in part_tables(describe_part(run.part_path(1)), rows=5):
        console.print(table)
    console.print(f"Look further: storage inspect {run.part_path(1)}", highlight=False, soft_wrap=True)


def _easy_vqa() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("the demo needs the package easy-vqa: pip install 'halp-extractor[demo]'")
    return Path(spec.origin).parent


def _write_table(questions: Path, table: Path, number: int) -> int:
    rows = json.loads(questions.read_text())
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image_id", "question", "answer"])
        for index, (text, answer, image) in enumerate(rows[:number]):
            writer.writerow([f"easy-vqa-test-{index:05d}", f"{image}.png", text, answer])
    return len(rows)

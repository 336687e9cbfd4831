"""easy-vqa: questions about one coloured shape on a plain ground, which the demo asks and its model learned from."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.errors import UserError

AnswerType = Literal["shape", "colour", "yes-no"]
MODEL = Path(__file__).parent.parent / "data" / "Qwen2.5-VL-Demo"  # made by demo_model.py
SHAPES = frozenset({"circle", "rectangle", "triangle"})


@dataclass(frozen=True, slots=True)
class Row:
    """A question with its answer; `image_id` is the file's name in the split's directory of images."""

    image_id: str
    question: str
    answer: str

    @property
    def answer_type(self) -> AnswerType:
        """What kind of answer is asked for."""
        if self.answer in {"yes", "no"}:
            return "yes-no"
        return "shape" if self.answer in SHAPES else "colour"


@dataclass(frozen=True, slots=True)
class EasyVqa:
    """One split: its questions in the file's order."""

    images_dir: Path
    rows: tuple[Row, ...]


def read_easy_vqa(split: Literal["train", "test"]) -> EasyVqa:
    """Read a split from the installed package, without importing it. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("the package easy-vqa is not installed: pip install 'halp-extractor[demo]'")
    directory = Path(spec.origin).parent / "data" / split
    questions = json.loads((directory / "questions.json").read_text(encoding="utf-8"))
    rows = tuple(Row(f"{image}.png", text, answer) for text, answer, image in questions)
    return EasyVqa(directory / "images", rows)

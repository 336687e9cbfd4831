"""Answers beside their images, on a terminal: who looks can tell which are right."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image
from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table

from storage.screen.console import RichText, Text

_IMAGES = 4
_LINES = 10  # questions of one image: as many as the lines of its picture with the name below
_SIDE = 18  # pixels that an image is shown with; a character holds two, one above the other


def gallery(answers: pd.DataFrame, images_dir: Path, *, pictures: bool) -> Table:
    """Return a table of a few images with their questions and answers, some with a mistake if there are any.

    `answers` has a row per question and a column `right`. `pictures` draws the images, which needs a terminal with colours.
    """
    table = Table(title="some answers", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    for name in ("image", "question", "answer (truth)"):
        table.add_column(name, no_wrap=True)  # a line each, or questions and answers would not stand side by side
    for image_id, rows in _chosen(answers):
        shown = rows.head(_LINES)
        image: RichText = Text(image_id)
        if pictures:
            image = Text("\n").join([picture(images_dir / image_id), image])
        given = zip(shown["answer"], shown["ground_truth_answer"], shown["right"])
        cells = (Text("\n").join(map(_line, shown["question"])), Text("\n").join(_answer(*one) for one in given))
        table.add_row(image, *cells)
    return table


def accuracy_table(answers: pd.DataFrame) -> Table:
    """Return how many answers are right, by type."""
    table = Table(title="answers that are right", title_justify="left")
    for name in ("answer type", "questions", "right", "accuracy"):
        table.add_column(name, justify="left" if name == "answer type" else "right")
    groups = [(str(name), rows["right"]) for name, rows in answers.groupby("answer_type")]
    for name, right in [*groups, ("all", answers["right"])]:
        style = "bold" if name == "all" else ""
        table.add_row(name, f"{len(right):,}", f"{right.sum():,}", f"{right.mean():.1%}", style=style)
    return table


def picture(path: Path) -> RichText:
    """Return an image as coloured half blocks."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    lines = []
    for row in range(0, _SIDE, 2):
        line = Text()
        for column in range(_SIDE):
            upper, lower = (Color.from_rgb(*small.getpixel((column, row + below))) for below in (0, 1))  # type: ignore[misc]
            line.append("▀", Style(color=upper, bgcolor=lower))
        lines.append(line)
    return Text("\n").join(lines)


def _answer(answer: str, truth: str, right: bool) -> RichText:
    if right:
        return Text.assemble(("✓ ", "green"), _line(answer))
    return Text.assemble(("✗ ", "bold red"), _line(answer), Text(f" ({truth})", "bold"))


def _line(text: str) -> RichText:
    return Text(" ".join(text.split()))


def _chosen(answers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the first images with a mistake, two if there are, and the first without, in the CSV's order."""
    images = [(str(name), rows) for name, rows in answers.groupby("image_id", sort=False)]
    mistaken = [name for name, rows in images if not rows["right"].all()][:2]
    others = [name for name, rows in images if rows["right"].all()][: _IMAGES - len(mistaken)]
    wanted = {*mistaken, *others}
    return [(name, rows) for name, rows in images if name in wanted]

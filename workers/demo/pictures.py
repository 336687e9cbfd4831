"""Pictures of easy-vqa with what is asked about them, and the batches that the demo's model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True, slots=True)
class Lesson:
    """A question with its answer: the ids of [suffix | answer | end of turn], and where the answer begins."""

    ids: tuple[int, ...]
    answer_at: int
    answer_type: str
    weight: float  # how likely it is asked, among those of its picture


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, the colour of its ground, where its shape is (top, bottom, left, right), and the lessons about it."""

    pixels: Pixels
    ground: Pixels
    box: tuple[int, int, int, int]
    lessons: tuple[Lesson, ...]

    @classmethod
    def of(cls, pixels: Pixels, lessons: Sequence[Lesson]) -> Picture:
        """Find the ground, which is the colour of most pixels, and the shape, which is the rest."""
        colours, numbers = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        ground = colours[numbers.argmax()]
        differs = (pixels != ground).any(-1)
        rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        return cls(pixels, ground, box, tuple(lessons))

    def moved(self, random: np.random.Generator) -> Pixels:
        """Return the image with its shape elsewhere, mirrored or not."""
        top, bottom, left, right = self.box
        height, width = self.pixels.shape[:2]
        # A shape that the border cuts stays at the border: elsewhere it would be another shape.
        row = top if top == 0 or bottom == height else int(random.integers(0, height - (bottom - top) + 1))
        column = left if left == 0 or right == width else int(random.integers(0, width - (right - left) + 1))
        pixels = np.empty_like(self.pixels)
        pixels[:] = self.ground
        pixels[row : row + bottom - top, column : column + right - left] = self.pixels[top:bottom, left:right]
        return np.ascontiguousarray(pixels[:, ::-1]) if random.random() < 0.5 else pixels

    def some_lessons(self, number: int, random: np.random.Generator) -> tuple[Lesson, ...]:
        """Draw some lessons by their weights, none twice."""
        weights = np.array([lesson.weight for lesson in self.lessons])
        chosen = random.choice(len(weights), min(number, len(weights)), replace=False, p=weights / weights.sum())
        return tuple(self.lessons[i] for i in chosen)


def draw_batch(pictures: Sequence[Picture], step: int, *, size: int, lessons: int, seed: int) -> list[Picture]:
    """Return a step's pictures, each once an epoch, moved and with some of its lessons: a function of seed and step alone."""
    epoch, place = divmod(step, len(pictures) // size)
    order = np.random.default_rng([seed, 0, epoch]).permutation(len(pictures))
    random = np.random.default_rng([seed, 1, step])
    return [
        replace(pictures[i], pixels=pictures[i].moved(random), lessons=pictures[i].some_lessons(lessons, random))
        for i in order[place * size :][:size]
    ]

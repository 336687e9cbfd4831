"""Findings: what is worth knowing of a dataset before its run, each counted, with a few examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from producer.check.survey import Survey
from producer.dataset.faults import short
from producer.dataset.images import MAX_MISSING
from producer.dataset.nearby import describe_missing
from producer.options import RunOptions
from storage.computation import QUESTION, Computation
from storage.question import Question
from storage.stores.location import resolve_location
from workers.checkpoint.published import other_answer_length
from workers.checkpoint.shapes import Shape
from workers.extract.preprocess import MAX_PROMPT

_SHOWN = 5
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_MISSING_WORDS = {"NA", "N/A", "NaN", "nan", "null", "NULL", "None", "n/a", "#N/A", "<NA>"}  # as pandas reads them
_LETTERS = re.compile(r"\S(, ?\S| ,  ?)+")
_TEMPLATE_TOKENS = 30


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know before the run. `fails`: questions would fail; `look`: the data may not be what is meant."""

    level: Literal["refused", "fails", "look"]
    kind: str
    number: int
    message: str
    examples: tuple[str, ...] = ()


def table_findings(questions: Sequence[Question]) -> list[Finding]:
    """Find ids that other readers would change, questions asked twice, and answers that look broken."""
    findings = []
    changed = {q.question_id: after for q in questions if (after := _as_number(q.question_id)) != q.question_id}
    if changed:
        message = "question ids change where they are read as numbers: read them as text, as in pandas' dtype=str"
        findings.append(_finding("look", "id_changes", [f"{a!r} becomes {b}" for a, b in changed.items()], message))
    met = Counter(_as_number(question.question_id) for question in questions)
    if clashes := [name for name, number in met.items() if number > 1]:
        message = "numbers stand for several question ids each, where ids are read as numbers"
        findings.append(_finding("look", "ids_meet", clashes, message))
    twice = Counter((question.image_id, question.question) for question in questions)
    if again := [f"{image}: {short(text)}" for (image, text), number in twice.items() if number > 1]:
        findings.append(_finding("look", "asked_twice", again, "questions are asked about one image more than once"))
    if broken := [q for q in questions if _looks_broken(q.ground_truth_answer)]:
        examples = [f"{q.question_id}: {short(q.ground_truth_answer)}" for q in broken]
        findings.append(_finding("look", "answer_looks_broken", examples, "answers look broken: see how the table was made"))
    return findings


def _as_number(text: str) -> str:
    """Return what a reader that guesses types makes of a text: the number, a missing value, or the text itself."""
    if text in _MISSING_WORDS:
        return "a missing value"
    if not text.isascii() or not _NUMBER.fullmatch(text):
        return text
    stripped = text.strip()
    if stripped.lstrip("+-").isdecimal():
        return str(int(stripped))
    return str(float(stripped))


def _looks_broken(answer: str) -> bool:
    """Tell whether an answer is a text joined letter by letter (`y, e, s`), a printed list, or a missing value's name."""
    text = answer.strip()
    letters = bool(_LETTERS.fullmatch(text)) and any(c.isalpha() for c in text)
    printed = text[:1] + text[-1:] in {"[]", "{}"} and len(text) > 1
    return letters or printed or text in {"nan", "NaN", "None", "null", "NULL"}


def answer_length(shape: Shape | None, asked: Computation) -> list[Finding]:
    """Return what differs from the published answers, which `--halp-compat` is compared with."""
    note = None if shape is None or shape.model_type is None else other_answer_length(shape.model_type, asked)
    return [Finding("look", "answer_length", 1, note)] if note else []


def without_images(options: RunOptions, questions: Sequence[Question]) -> list[Finding]:
    """Find the questions that have no image, though they are asked with theirs."""
    if options.computation.blind or not (without := [q.question_id for q in questions if not q.image_id]):
        return []
    message = "of the questions have no image, and are asked without: they get no vision fields"
    return [_finding("look", "no_image", without, message)]


def image_findings(options: RunOptions, seen: Survey, asked: Counter[str]) -> list[Finding]:
    """Find the images whose questions would fail, by the reason that a run would record."""
    findings = []
    by_reason: dict[str, list[str]] = {}
    for problem in seen.problems:
        by_reason.setdefault(problem.reason, []).append(problem.image_id)
    for reason, images in by_reason.items():
        message = f"of the images would fail as {reason}, with {sum(asked[i] for i in images):,} of the questions"
        findings.append(_finding("fails", reason, images, message))
    missing = len(by_reason.get("image_missing", ()))
    if missing > MAX_MISSING * len(asked) and not options.allow_missing:
        nearby = describe_missing(by_reason["image_missing"], resolve_location(options.images_dir or "/"))
        message = f"of {len(asked):,} images are missing: is --images-dir right? --allow-missing runs anyway\n{nearby}"
        findings.append(Finding("refused", "many_missing", missing, message))
    if seen.turned and not options.computation.exif_rotation:
        message = "of the images are stored turned, by their EXIF data, and are taken as stored: --exif-rotation turns them"
        findings.append(_finding("look", "exif_turned", seen.turned, message))
    return findings


def long_prompts(questions: Sequence[Question], tokens: dict[str, int], prompt: str) -> list[Finding]:
    """Find prompts that may not fit, four characters to a token: the worker's tokenizer has the last word."""
    around = len(prompt.replace(QUESTION, ""))
    seen = {question.question_id: sum(tokens.get(image_id, 0) for image_id in question.images) for question in questions}
    words = {question.question_id: (around + len(question.question)) // 4 for question in questions}
    long = [name for name, number in seen.items() if number + words[name] + _TEMPLATE_TOKENS > MAX_PROMPT]
    message = f"prompts may exceed {MAX_PROMPT:,} tokens and fail as prompt_too_long: lower --max-pixels or shorten them"
    return [_finding("fails", "prompt_too_long", long, message)] if long else []


def _finding(level: Literal["fails", "look"], kind: str, examples: Sequence[str], message: str) -> Finding:
    return Finding(level, kind, len(examples), message, tuple(examples[:_SHOWN]))

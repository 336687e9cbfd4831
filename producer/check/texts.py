"""The texts that the model would be asked: what in them is more than text to a model, and what is empty."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from producer.check.findings import Finding
from producer.options import RunOptions
from storage.question import Question
from storage.wording import asked, column_names, values
from workers.engine.prompt import PLACEHOLDERS

_SHOWN = 5  # examples, and special tokens in a line
_IMAGE_WORD = "<image>"  # of other models' formats
# Qwen2.5-VL's, where the checkpoint's own tokenizer is not at hand.
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", *PLACEHOLDERS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Texts:
    """What the texts that the model is asked hold, each with the questions' ids."""

    special: dict[str, list[str]]  # special token to questions
    image_words: list[str]
    empty: dict[str, list[str]]  # column of the prompt to questions whose cell is empty
    parsed: bool

    def words(self) -> str:
        """Say it in one line."""
        holding = {name for ids in self.special.values() for name in ids}
        said = []
        if holding:
            how = "parsed, as the processor does" if self.parsed else "taken as text"
            said.append(f"special tokens in {len(holding):,} questions, {how}")
        if self.image_words:
            said.append(f"{_IMAGE_WORD} in {len(self.image_words):,} questions, which is text")
        return "; ".join(said) or "no special tokens in the questions"

    def findings(self) -> list[Finding]:
        """Return what may not be meant."""
        found = []
        usual = {t: ids for t, ids in self.special.items() if t not in PLACEHOLDERS}
        if usual and not self.parsed:
            message = "of the questions hold special tokens of the model ({}), taken as text: --special-tokens parse takes "
            found.append(_about("special_tokens", usual, message + "them as the model's processor does"))
        if placeholders := {t: ids for t, ids in self.special.items() if t in PLACEHOLDERS}:
            message = "of the questions hold placeholders of images or videos ({}), which are always taken as text: "
            message += "--strip-placeholders removes them"
            found.append(_about("placeholders", placeholders, message))
        if self.image_words:
            message = "of the questions hold {}, which is ordinary text here, as the image stands before the text anyway: "
            message += "--strip-placeholders removes it"
            found.append(_about("image_words", {_IMAGE_WORD: self.image_words}, message))
        if self.empty:
            message = "of the questions have an empty cell in a column of the prompt ({}), for which nothing is inserted"
            found.append(_about("empty_cells", self.empty, message))
        return found


def look_at_texts(options: RunOptions, questions: Sequence[Question], *, columns: bool) -> Texts:
    """Look at what the model would be asked of each row."""
    special: dict[str, list[str]] = {}
    image_words: list[str] = []
    empty: dict[str, list[str]] = {}
    known = re.compile("|".join(map(re.escape, sorted(_special_tokens(options.model), key=len, reverse=True))))
    names = column_names(options.computation.prompt) if columns else []
    for question in questions:
        text = asked(options.computation.prompt, question, columns=columns)
        for token in dict.fromkeys(known.findall(text)):
            special.setdefault(token, []).append(question.question_id)
        if _IMAGE_WORD in text and _IMAGE_WORD not in special:
            image_words.append(question.question_id)
        if names:
            row = values(question)
            for name in names:
                if not row[name].strip():
                    empty.setdefault(name, []).append(question.question_id)
    return Texts(special, image_words, empty, options.computation.special_tokens == "parse")


def _about(kind: str, by_name: dict[str, list[str]], message: str) -> Finding:
    ids = list(dict.fromkeys(name for ids in by_name.values() for name in ids))
    most = [name for name, _ in Counter({name: len(ids) for name, ids in by_name.items()}).most_common(_SHOWN)]
    shown = ", ".join(most) + (", …" if len(by_name) > _SHOWN else "")
    return Finding("look", kind, len(ids), message.format(shown), tuple(ids[:_SHOWN]))


def _special_tokens(model: str) -> tuple[str, ...]:
    """Return the special tokens of a checkpoint's tokenizer, or Qwen2.5-VL's where its file is not here or not readable."""
    try:
        tokens = json.loads((Path(model) / "tokenizer.json").read_bytes())["added_tokens"]
        found = tuple(str(token["content"]) for token in tokens if token["special"] and token["content"])
    except (OSError, ValueError, KeyError, TypeError):  # the worker says what is wrong with it
        found = ()
    return found or _SPECIAL

"""Right or wrong: an answer against the ground truth, after the usual normalisation of VQA. Limits: docs/probing.md."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_YES_NO = frozenset({"yes", "no"})
_APOSTROPHES = str.maketrans("", "", "'’ʼ`´")
# What is left of a number's own punctuation: 1,000 is 1000, while the point of 2.5 and the sign of -5 mean something.
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OF_NUMBERS = re.compile(r"(?<=\d)\.(?=\d)|(?<![\w.])-(?=\d)")


def normalise(text: str) -> str:
    """Return a text in lower case, without articles and punctuation, its number words as digits."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_APOSTROPHES)
    text = _THOUSANDS.sub("", text)
    kept = {match.start() for match in _OF_NUMBERS.finditer(text)}
    spaced = "".join(c if i in kept or not _is_punctuation(c) else " " for i, c in enumerate(text))
    return " ".join(_NUMBERS.get(word, word) for word in spaced.split() if word not in _ARTICLES)


def is_right(answer: str, ground_truth: str) -> bool:
    """Tell whether an answer is the ground truth; where that is yes or no, the answer's first word decides."""
    given, true = normalise(answer), normalise(ground_truth)
    if true in _YES_NO:
        given = given.split(" ")[0]
    return given == true


def _is_punctuation(character: str) -> bool:
    return character not in "%&#@" and unicodedata.category(character).startswith("P")

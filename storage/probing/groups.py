"""Groups of questions that must stay on one side of a split: those about the same images, and what hangs together by them."""

from __future__ import annotations

import pandas as pd

from storage.question import DIGESTS, images_of


def image_groups(frame: pd.DataFrame) -> list[str]:
    """Return the group of each question: its image by content, of several that of the first one that it is joined to by any.

    Without an image by name, where one is named (asked blind), else the question itself: equal texts have equal vectors.
    """
    digests = frame["image_sha256"] if "image_sha256" in frame else [None] * len(frame)
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = parents[parent]
            key = parents[key]
        return key

    firsts = []
    for digest, image_id, question in zip(digests, frame["image_id"].astype(str), frame["question"].astype(str), strict=True):
        keys = digest.split(DIGESTS) if isinstance(digest, str) else [*images_of(image_id)] or [f"question {question}"]
        for other in keys[1:]:
            parents[root(other)] = root(keys[0])
        firsts.append(keys[0])
    return [root(first) for first in firsts]

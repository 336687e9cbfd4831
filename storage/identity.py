"""Whose a staged file is: the run, the question, and a digest of all that its answer depends on.

A directory's name says none of it: a run may be removed or moved away, and another be begun under the same name, while a worker
still computes the first one's questions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from storage.errors import DamagedError
from storage.question import Question
from storage.settings import ALWAYS_WRITTEN, RunSettings

# In this order, and only where they are not the default: a setting that a later version adds leaves the digests as they are.
_COMPUTED = (
    "model", "revision", "model_digest", "dtype", "layers", "vision_encoder", "prompt", "prompt_columns", "system_prompt",
    "chat_template", "special_tokens", "max_new_tokens", "repetition_penalty", "exact", "halp_compat", "exif_rotation",
    "min_pixels", "max_pixels", "images_dir", "image_roots", "blind",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Identity:
    """Which question of which run something was computed for. `required`: what says nothing of it is not accepted."""

    text: str
    question_id: str
    required: bool
    former: str = ""  # what a version in between called it

    def check(self, found: str | None) -> None:
        """Raise DamagedError where a staged file is of something else; `found` is what it says, None where it says nothing."""
        if found is None and not self.required:  # written by the version before, of which this run is too
            return
        if found not in {self.text, self.former or self.text}:
            whose = "does not say whose it is" if found is None else "is of another run or question"
            raise DamagedError(f"{whose}, not question {self.question_id!r} of this run as it is planned")


def settings_digests(settings: RunSettings) -> tuple[str, str]:
    """Return the digest of the settings that a result depends on, and the one that a version in between took.

    That one followed the order in which the settings are declared, and left out what was the default.
    """
    former = settings.model_dump_json(include=set(_COMPUTED), exclude_defaults=True)
    found = settings.model_dump(mode="json", include=set(_COMPUTED), exclude_defaults=True)
    found |= settings.model_dump(mode="json", include=ALWAYS_WRITTEN)
    text = json.dumps({name: found[name] for name in _COMPUTED if name in found}, separators=(",", ":"), ensure_ascii=False)
    digest, before = (hashlib.sha256(t.encode(errors="replace")).hexdigest() for t in (text, former))
    return digest, before


def identity_of(settings: RunSettings, digests: tuple[str, str], question: Question) -> Identity:
    """Return a question's identity in a run, whose settings have those digests."""
    texts = []
    for digest in digests:
        asked = json.dumps([digest, question.question_id, question.image_id, question.question])
        texts.append(f"{settings.run_id}/{hashlib.sha256(asked.encode()).hexdigest()[:32]}")
    return Identity(texts[0], question.question_id, settings.staged_identity, texts[1])

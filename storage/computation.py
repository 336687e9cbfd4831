"""How questions are computed: one field is one option, from the command line to the engine and into the part.

An option's name, type, default, bounds and help are spelled here and nowhere else: the command line is made from the fields,
run.json holds them, workers hand them on whole, and parts have them as attributes.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["bfloat16", "float32"]
Layers = tuple[int, ...] | Literal["all"] | None
AnswerState = Literal["first", "last", "mean", "all"]
SpecialTokens = Literal["text", "parse"]
QUESTION = "{question}"  # where the question stands in a prompt

# A part says these in other words: by the template's digest, and by the positions.
_NOT_RECORDED = {"chat_template", "halp_compat"}
ONLY_IF_ASKED = {"answer_states", "blind"}


class Computation(BaseModel):
    """How questions are computed."""

    model_config = ConfigDict(frozen=True)

    dtype: Dtype = Field("bfloat16", description="What the model computes in.")
    layers: Layers = Field(None, description="Decoder layers to keep, as in 0,7,14, or all. [default: 0, n/4, n/2, 3n/4, n-1]")
    max_new_tokens: int = Field(200, ge=0, description="Length of an answer; 0 keeps the vectors only.")
    prompt: str = Field(
        QUESTION,
        description="What the model is asked, as in '{question} A: {A} B: {B}': {name} is the row's text in a column, "
        "{{ a brace.",
    )
    system_prompt: str | None = Field(
        None, description="The system message, as in 'Answer in one word.' [default: the template's]"
    )
    chat_template: str | None = Field(
        None,
        description="A Jinja template, or a chat_template.json, in place of the checkpoint's; read now, and kept with the run.",
    )
    special_tokens: SpecialTokens = Field(
        "text",
        description="Of the model's special tokens in the prompt: take them as text, or parse them as the processor does.",
    )
    answer_states: tuple[AnswerState, ...] = Field(
        (),
        description="States of the answer's own tokens to keep, as in last,mean: first, last, mean, all. [default: none]",
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, description="Of generated and prompt tokens. [default: the checkpoint's]"
    )
    vision_encoder: bool = Field(True, description="Keep the vision tower's mean before the merger too.")
    exact: bool = Field(False, description="Batch 1, nothing shared: slow, free of batch effects.")
    blind: bool = Field(False, description="Ask without the images: what the question alone gives away, to compare with.")
    halp_compat: bool = Field(False, description="The published features and positions: see docs/format.md.")
    exif_rotation: bool = Field(False, description="Turn images as their EXIF data say; the reference recipe does not.")
    min_pixels: int | None = Field(None, ge=1, description="Smaller images are enlarged. [default: the checkpoint's]")
    max_pixels: int | None = Field(None, ge=1, description="Larger images are shrunk. [default: the checkpoint's]")

    def options(self) -> dict[str, Any]:
        """Return the fields of this class by name, also of a subclass that has more."""
        return {name: getattr(self, name) for name in Computation.model_fields}

    def recorded(self) -> dict[str, Any]:
        """Return what a part records of it."""
        found = {k: v for k, v in self.options().items() if k not in _NOT_RECORDED and v is not None}
        return {k: v for k, v in found.items() if v or k not in ONLY_IF_ASKED}

    def chat_template_sha256(self) -> str | None:
        """Return the digest of the chat template, if it is not the checkpoint's."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

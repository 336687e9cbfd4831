"""The immutable settings of a run (`.run/run.json`) and what the first worker adds to them (`.run/model.json`)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 1

Dtype = Literal["bfloat16", "float32"]
Order = Literal["image", "csv"]
SpecialTokens = Literal["text", "parse"]
QUESTION = "{question}"  # where the question stands in a prompt

# Where the token vectors are taken. The published scripts' vision position is a token in the middle of the prompt.
LAST_POSITIONS = "last_image_token,last_prompt_token"
HALP_POSITIONS = "min(patches,seq_len//2),last_prompt_token"

# What a second `enqueue` of the same run may differ in: who made it and when, not what it computes. How a prompt is read
# follows from the prompt.
_NOT_COMPARED = {"run_id", "created_at", "software_version", "dataset", "prompt_columns"}


class RunSettings(BaseModel):
    """What a run computes. Written once; every worker and the collector read it and never the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    run_id: str
    created_at: str
    software_version: str

    model: str
    revision: str
    model_digest: str  # what the queue's name carries: of the revision, or of the local checkpoint's content
    model_slug: str
    dtype: Dtype
    layers: tuple[int, ...] | Literal["all"] | None  # None: 0, n//4, n//2, 3n//4, n-1 of the checkpoint
    vision_encoder: bool = True
    prompt: str = QUESTION
    prompt_columns: bool = False  # {name} is a column and {{ a brace; a run from before that knows {question} alone
    system_prompt: str | None = None  # None: what the chat template says where there is none
    chat_template: str | None = None  # its text; None: the checkpoint's
    special_tokens: SpecialTokens = "text"  # in what is asked: ordinary text, or tokens as the processor makes them
    max_new_tokens: int
    repetition_penalty: float | None = None  # None: the checkpoint's own
    exact: bool = False
    halp_compat: bool = False
    exif_rotation: bool = False
    min_pixels: int | None  # None: the checkpoint's own
    max_pixels: int | None

    dataset: str
    dataset_sha256: str
    images_dir: str
    image_roots: tuple[str, ...]
    order: Order
    limit: int | None
    test: bool
    checkpoint_interval: int
    part_digits: int

    def chat_template_sha256(self) -> str | None:
        """Return the digest of the run's own chat template, if it has one."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which two runs compute something else: name to (ours, the other's)."""
        ours, theirs = self.model_dump(exclude=_NOT_COMPARED), other.model_dump(exclude=_NOT_COMPARED)
        return {name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]}


class ModelFacts(BaseModel):
    """What the loaded checkpoint is and how it is read; two workers of one run must agree in all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    revision: str
    config_sha256: str
    template_sha256: str
    num_hidden_layers: int
    hidden_size: int
    vision_hidden_size: int
    layers: tuple[int, ...]
    min_pixels: int
    max_pixels: int
    repetition_penalty: float
    prompt: str = QUESTION
    system_prompt: str | None = None
    chat_template_sha256: str | None = None  # of the run's own template; None: the checkpoint's
    special_tokens: SpecialTokens = "text"
    exact: bool = False
    vision_encoder: bool = True
    exif_rotation: bool = False
    positions: str = LAST_POSITIONS
    vision_only_definition: str = "merged"  # or `encoder`: the published features' mean before the merger

    def field_widths(self) -> dict[str, int]:
        """Return the vectors that a question has: HALP field to width."""
        merged = self.vision_only_definition == "merged"
        widths = {"vision_only_representation": self.hidden_size if merged else self.vision_hidden_size}
        if merged and self.vision_encoder:
            widths["vision_encoder_representation"] = self.vision_hidden_size
        for field in ("vision_token_representation", "query_token_representation"):
            widths |= {f"{field}/layer_{layer}": self.hidden_size for layer in self.layers}
        return widths

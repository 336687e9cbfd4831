"""The prompt: the chat template around one image and one question, cut at the two places that differ between samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from workers.errors import EngineStartError

_QUESTION = "QUESTION"
_IMAGE = "<|image_pad|>"


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids before the image tokens, between them and the question, and after the question; the template's digest."""

    head_ids: tuple[int, ...]
    after_image_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    sha256: str


def split_prompt(processor: Any) -> PromptParts:
    """Render the chat template over [image, question] and cut it. Raises EngineStartError for a foreign template."""
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    head, found_image, rest = rendered.partition(_IMAGE)
    between, found_question, tail = rest.partition(_QUESTION)
    if not found_image or not found_question or _IMAGE in rest:
        raise EngineStartError(f"the checkpoint's chat template is not Qwen2.5-VL's: it renders {rendered!r}")
    whole = tuple(processor.tokenizer(between + _QUESTION + tail)["input_ids"])
    parts = [tuple(processor.tokenizer(text)["input_ids"]) for text in (head, between, tail)]
    if whole != parts[1] + tuple(processor.tokenizer(_QUESTION)["input_ids"]) + parts[2]:
        raise EngineStartError("the checkpoint's tokenizer merges the question with the template around it")
    return PromptParts(parts[0], parts[1], parts[2], hashlib.sha256(rendered.encode()).hexdigest())


class QuestionTokenizer:
    """Tokenises questions as text: `<|im_end|>` or `<|image_pad|>` in a question is six or so ordinary tokens."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True

    def __call__(self, question: str) -> tuple[int, ...]:
        """Return a question's token ids."""
        return tuple(self._tokenizer.encode(question, add_special_tokens=False).ids)

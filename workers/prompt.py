"""The prompt: the chat template around one image and one text, cut at the two places that differ between samples."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from storage.settings import SpecialTokens
from workers.errors import EngineStartError

# Stand for the text while the template is rendered: the first that the template itself does not hold.
_STAND_INS = ("QUESTION", "QUERY-TEXT", "THE-USERS-TEXT-STANDS-HERE")
_IMAGE = "<|image_pad|>"
# What the processor expands to an image's or a video's tokens. In a text they would be images without pixels.
PLACEHOLDERS = (_IMAGE, "<|video_pad|>")


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """What a run has rendered otherwise than the checkpoint would: nothing, by default."""

    system: str | None = None
    template: str | None = None  # Jinja


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids before the image tokens, between them and the question, and after the question; the template's digest.

    Where the template's own words touch the question, with no special token between, they are tokenised with it: `lead` and
    `trail`. `stripped`: the template drops the blanks at the question's ends.
    """

    head_ids: tuple[int, ...]
    after_image_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    sha256: str
    lead: str = ""
    trail: str = ""
    stripped: bool = False

    def around(self, question: str) -> str:
        """Return a question with what is tokenised with it."""
        return self.lead + (question.strip() if self.stripped else question) + self.trail


def split_prompt(processor: Any, style: PromptStyle | None = None) -> PromptParts:
    """Render the chat template over [image, question] and cut it. Raises EngineStartError for a template that is foreign."""
    style = style or PromptStyle()
    question, (head, between, tail) = _cut(processor, style)
    stripped = _strips(processor, style, question, f"{head}{_IMAGE}{between}", tail)
    tokenize = processor.tokenizer
    added = [re.escape(token) for token in tokenize.get_added_vocab()]
    # A tokenizer never merges over an added token: up to the last one before the question, and from the first one after it,
    # the ids are the same whatever is asked.
    ends = [match.end() for match in re.finditer("|".join(added), between)] if added else []
    begin = re.search("|".join(added), tail) if added else None
    last, first = max(ends, default=0), begin.start() if begin else len(tail)
    before, lead, trail, after = between[:last], between[last:], tail[:first], tail[first:]
    parts = [tuple(tokenize(text)["input_ids"]) for text in (head, before, lead + question + trail, after)]
    if tuple(tokenize(between + question + tail)["input_ids"]) != parts[1] + parts[2] + parts[3]:
        raise EngineStartError("the checkpoint's tokenizer merges the question with the template around it")
    digest = hashlib.sha256(f"{head}{_IMAGE}{between}{question}{tail}".encode()).hexdigest()
    return PromptParts(parts[0], parts[1], parts[3], digest, lead, trail, stripped)


def _cut(processor: Any, style: PromptStyle) -> tuple[str, tuple[str, str, str]]:
    """Return what stood for the question, and the text before the image, between the two, and after the question."""
    rendered = ""
    for question in _STAND_INS:
        rendered = _rendered(processor, style, question)
        head, found_image, rest = rendered.partition(_IMAGE)
        between, found_question, tail = rest.partition(question)
        if found_image and found_question and _IMAGE not in rest and question not in tail:
            return question, (head, between, tail)
    whose = "the checkpoint's chat template" if style == PromptStyle() else "the chat template with the run's settings"
    raise EngineStartError(f"{whose} is not Qwen2.5-VL's: it renders {rendered!r}")


def _rendered(processor: Any, style: PromptStyle, question: str) -> str:
    """Render the template over the messages, the system prompt as a string or, where that gets lost, as a list."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    if style.template is not None:
        options["chat_template"] = style.template
    if style.system is None:
        return str(processor.apply_chat_template([user], **options))
    for content in (style.system, [{"type": "text", "text": style.system}]):
        messages = [{"role": "system", "content": content}, user]
        rendered = str(processor.apply_chat_template(messages, **options))
        if style.system.strip() in rendered:
            return rendered
    raise EngineStartError("the chat template has no place for a system prompt")


def _strips(processor: Any, style: PromptStyle, question: str, before: str, after: str) -> bool:
    """Tell whether the template drops the blanks around a question. Raises EngineStartError if it changes it otherwise."""
    probes = [f"{blanks}{question} <image> aZ1é&<'\n\n{question}{blanks[::-1]}" for blanks in (" \n", "\n\t")]
    rendered = [_rendered(processor, style, probe) for probe in probes]
    for strips, kept in ((False, probes), (True, [probe.strip() for probe in probes])):
        if rendered == [before + text + after for text in kept]:
            return strips
    raise EngineStartError("the chat template changes the question's text: it must stand as it is")


class QuestionTokenizer:
    """Tokenises what is asked: as text, `<|im_end|>` is six or so ordinary tokens; parsed, the one that the processor makes."""

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True

    def __call__(self, text: str, special_tokens: SpecialTokens = "text") -> tuple[int, ...]:
        """Return a text's token ids. Placeholders of images and videos are text in any case."""
        tokenizer = self._tokenizer if special_tokens == "text" else self._parsing
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _parsing(self) -> Tokenizer:
        """The checkpoint's tokenizer, but for the placeholders: their ids stay, under names that no text holds."""
        body = json.loads(self._json)
        for token in body.get("added_tokens", ()):
            if token["content"] in PLACEHOLDERS:
                token["content"] = f"<|{secrets.token_hex(16)}|>"
        return Tokenizer.from_str(json.dumps(body))

"""The prompt: the chat template around one image and one text, cut at the two places that differ between samples."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from storage.computation import SpecialTokens
from workers.errors import EngineStartError

# Stand for the text while the template is rendered: the first that the template itself does not hold.
STAND_INS = ("QUESTION", "QUERY-TEXT", "THE-USERS-TEXT-STANDS-HERE")
_IMAGE = "<|image_pad|>"
# What a template may do to a question shows in one of these: trimming, other case, escaping, shortening, replacing.
PROBES = (
    "Is there a dog?",
    "",
    " \n",
    "\n Two  blanks\there,\r\n'quotes\" & <b>marks</b> {{ x }} {% y %}, NAÏVE café 画像 \\n 3.14?  ",
    "long " * 2000 + "end",
)
# What the processor expands to an image's or a video's tokens. In a text they would be images without pixels.
PLACEHOLDERS = (_IMAGE, "<|video_pad|>")


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """What a run has rendered otherwise than the checkpoint would: nothing, by default."""

    system: str | None = None
    template: str | None = None  # Jinja
    images: int = 1  # before the question


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids before and between images, between them and the question, and after the question; the template's digest.

    Where the template's own words touch the question, with no special token between, they are tokenised with it: `lead` and
    `trail`. `stripped`: the template drops the blanks at the question's ends. `anchor`: a text before them that is tokenised
    with them and left out again, for tokenizers that treat the beginning of a text in another way.
    """

    head_ids: tuple[int, ...]
    after_image_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    sha256: str
    lead: str = ""
    trail: str = ""
    stripped: bool = False
    anchor: str = ""
    image_tokens: int | None = None  # the most of an image, where there are several and the processor sizes them

    def around(self, question: str) -> str:
        """Return a question with what is tokenised with it."""
        return self.lead + (question.strip() if self.stripped else question) + self.trail

    def suffix(self, tokenize: QuestionTokenizer, question: str, special_tokens: SpecialTokens = "text") -> tuple[int, ...]:
        """Return the token ids of everything after the image tokens."""
        asked = tokenize(self.anchor + self.around(question), special_tokens)
        return (*self.after_image_ids, *asked[len(tokenize(self.anchor)) :], *self.tail_ids)


def split_prompt(processor: Any, style: PromptStyle | None = None) -> PromptParts:
    """Render the chat template over [image, question] and cut it.

    Raises EngineStartError for a foreign template, and where the parts put together are not the processor's prompt.
    """
    style = style or PromptStyle()
    question, (head, between, tail) = _cut(processor, style)
    stripped = _strips(processor, style, f"{head}{_IMAGE}{between}", tail)
    before, lead, trail, after = plain_text_apart(processor.tokenizer, between, tail)
    head_ids, after_image_ids, tail_ids = (tuple(processor.tokenizer(t)["input_ids"]) for t in (head, before, after))
    digest = hashlib.sha256(f"{head}{_IMAGE}{between}{question}{tail}".encode()).hexdigest()
    parts = PromptParts(head_ids, after_image_ids, tail_ids, digest, lead, trail, stripped)
    if not _are_the_prompt(processor, style, parts):
        raise EngineStartError(
            "the checkpoint's tokenizer merges the question with the template around it, or adds tokens of its own: restore "
            "tokenizer.json, tokenizer_config.json and the chat template of the base checkpoint"
        )
    return parts


def _cut(processor: Any, style: PromptStyle) -> tuple[str, tuple[str, str, str]]:
    """Return what stood for the question, and the text before the image, between the two, and after the question."""
    rendered = ""
    for question in STAND_INS:
        rendered = render(processor, style, question)
        head, found_image, rest = rendered.partition(_IMAGE)
        between, found_question, tail = rest.partition(question)
        if found_image and found_question and _IMAGE not in rest and question not in tail:
            return question, (head, between, tail)
    raise EngineStartError(f"{whose(style)} is not Qwen2.5-VL's: it renders {rendered!r}")


def render(processor: Any, style: PromptStyle, question: str) -> str:
    """Render the template over the messages, the system prompt as a string or, where that gets lost, as a list."""
    content: list[dict[str, str]] = [{"type": "image"}] * style.images
    user = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    if style.template is not None:
        options["chat_template"] = style.template
    if style.system is None:
        return str(processor.apply_chat_template([user], **options))
    for system in (style.system, [{"type": "text", "text": style.system}]):
        messages = [{"role": "system", "content": system}, user]
        rendered = str(processor.apply_chat_template(messages, **options))
        if style.system.strip() in rendered:
            return rendered
    raise EngineStartError("the chat template has no place for a system prompt")


def _strips(processor: Any, style: PromptStyle, before: str, after: str) -> bool:
    """Tell whether the template drops the blanks around a question. Raises EngineStartError if it changes it otherwise."""
    rendered = {probe: render(processor, style, probe) for probe in PROBES}
    if all(text == before + probe + after for probe, text in rendered.items()):
        return False
    for probe, text in rendered.items():
        if text != before + probe.strip() + after:
            raise EngineStartError(
                f"{whose(style)} does not insert the question as it is: {probe[:100]!r} becomes "
                f"{text.removeprefix(before).removesuffix(after)[:100]!r}. Use the base checkpoint's template "
                "(chat_template.json or chat_template.jinja)"
            )
    return True


def plain_text_apart(tokenizer: Any, between: str, tail: str) -> tuple[str, str, str, str]:
    """Cut the text before and after a question at the added tokens that are next to it.

    A tokenizer never merges over an added token: up to the last one before the question, and from the first one after it, the
    ids are the same whatever is asked.
    """
    tokens = "|".join(re.escape(token) for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    ends = [match.end() for match in re.finditer(tokens, between)] if tokens else []
    first = re.search(tokens, tail) if tokens else None
    start, end = max(ends, default=0), first.start() if first else len(tail)
    return between[:start], between[start:], tail[:end], tail[end:]


def _are_the_prompt(processor: Any, style: PromptStyle, parts: PromptParts) -> bool:
    """Tell whether head, image token, question and tail, put together, are the ids that the official path gives."""
    tokenize = QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str())
    image = processor.tokenizer(_IMAGE)["input_ids"]
    return all(
        [*parts.head_ids, *image, *parts.suffix(tokenize, probe)]
        == list(processor.tokenizer(render(processor, style, probe))["input_ids"])
        for probe in PROBES
    )


def whose(style: PromptStyle) -> str:
    """Say which template a style has."""
    own = (style.system, style.template) == (None, None)
    return "the checkpoint's chat template" if own else "the chat template with the run's settings"


class QuestionTokenizer:
    """Tokenises what is asked: as text, `<|im_end|>` is six or so ordinary tokens; parsed, the one that the processor makes."""

    def __init__(self, tokenizer_json: str, placeholders: Sequence[str] = PLACEHOLDERS) -> None:
        self._json, self._placeholders = tokenizer_json, placeholders
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
            if token["content"] in self._placeholders:
                token["content"] = f"<|{secrets.token_hex(16)}|>"
        return Tokenizer.from_str(json.dumps(body))

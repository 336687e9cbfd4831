"""The prompt: the chat template around one image and one question, cut at the two places that differ between samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from workers.errors import EngineStartError

_QUESTION = "QUESTION"
_IMAGE = "<|image_pad|>"
# What a template may do to a question shows in one of these: trimming, other case, escaping, shortening, replacing.
_PROBES = (
    "Is there a dog?",
    "",
    " \n",
    "\n Two  blanks\there,\r\n'quotes\" & <b>marks</b> {{ x }} {% y %}, NAÏVE café 画像 \\n 3.14?  ",
    "long " * 2000 + "end",
)


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids before the image tokens, between them and the question, and after the question; the template's digest.

    `around`: plain text of the template that is tokenised together with the question, since tokens may reach across.
    `trims`: whether the template strips the question.
    """

    head_ids: tuple[int, ...]
    after_image_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    sha256: str
    around: tuple[str, str] = ("", "")
    trims: bool = False


class QuestionTokenizer:
    """Tokenises questions as text: `<|im_end|>` or `<|image_pad|>` in a question is six or so ordinary tokens."""

    def __init__(self, tokenizer_json: str, around: tuple[str, str] = ("", ""), *, trims: bool = False) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._around, self._trims = around, trims

    def __call__(self, question: str) -> tuple[int, ...]:
        """Return a question's token ids, with those of the text around it."""
        before, after = self._around
        text = before + (question.strip() if self._trims else question) + after
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


def split_prompt(processor: Any) -> PromptParts:
    """Render the chat template over [image, question] and cut it.

    Raises EngineStartError for a foreign template, and where the parts put together are not the processor's prompt.
    """
    rendered = _render(processor, _QUESTION)
    head, found_image, rest = rendered.partition(_IMAGE)
    between, found_question, tail = rest.partition(_QUESTION)
    if not found_image or not found_question or _IMAGE in rest:
        raise EngineStartError(f"the checkpoint's chat template is not Qwen2.5-VL's: it renders {rendered!r}")
    trims = _trims(processor, head + _IMAGE + between, tail)
    ids, image = _ids(processor), _ids(processor)(_IMAGE)
    before, around, after = _plain_text_apart(processor.tokenizer, between, tail)
    digest = hashlib.sha256(rendered.encode()).hexdigest()
    for parts in (  # the first are the released checkpoints'
        PromptParts(ids(head), ids(between), ids(tail), digest, trims=trims),
        PromptParts(ids(head), ids(before), ids(after), digest, around, trims),
    ):
        if _are_the_prompt(processor, parts, image):
            return parts
    raise EngineStartError(
        "the checkpoint's tokenizer merges the question with the template around it, or adds tokens of its own: restore "
        "tokenizer.json, tokenizer_config.json and the chat template of the base checkpoint"
    )


def _render(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    )


def _trims(processor: Any, before: str, after: str) -> bool:
    """Tell whether the template strips questions. Raises EngineStartError where it does anything else to them."""
    rendered = {probe: _render(processor, probe) for probe in _PROBES}
    if all(text == before + probe + after for probe, text in rendered.items()):
        return False
    for probe, text in rendered.items():
        if text != before + probe.strip() + after:
            raise EngineStartError(
                f"the checkpoint's chat template does not insert the question as it is: {probe[:100]!r} becomes "
                f"{text.removeprefix(before).removesuffix(after)[:100]!r}. Use the base checkpoint's template "
                "(chat_template.json or chat_template.jinja)"
            )
    return True


def _ids(processor: Any) -> Any:
    return lambda text: tuple(processor.tokenizer(text)["input_ids"])


def _plain_text_apart(tokenizer: Any, between: str, tail: str) -> tuple[str, tuple[str, str], str]:
    """Cut off the plain text that touches the question: what is after the last added token before it, and the reverse."""
    tokens = "|".join(re.escape(token) for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    found = [*re.finditer(tokens, between)] if tokens else []
    start = found[-1].end() if found else 0
    first = re.search(tokens, tail) if tokens else None
    end = first.start() if first else len(tail)
    return between[:start], (between[start:], tail[:end]), tail[end:]


def _are_the_prompt(processor: Any, parts: PromptParts, image: Sequence[int]) -> bool:
    """Tell whether head, image token, question and tail, put together, are the ids that the official path gives."""
    tokenize = QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str(), parts.around, trims=parts.trims)
    return all(
        (*parts.head_ids, *image, *parts.after_image_ids, *tokenize(probe), *parts.tail_ids)
        == tuple(processor.tokenizer(_render(processor, probe))["input_ids"])
        for probe in (_QUESTION, *_PROBES)
    )

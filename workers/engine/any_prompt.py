"""The prompt of any family: what its processor makes of an image and a text, cut after the image and around the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.screen.terminal import amount
from workers.engine.models.base import Family, Inputs
from workers.engine.prompt import (
    PROBES,
    STAND_INS,
    PromptParts,
    PromptStyle,
    QuestionTokenizer,
    plain_text_apart,
    render,
    whose,
)
from workers.errors import EngineStartError, in_a_line

# Tokenizers of the sentencepiece kind put a blank before a text, which is not there in the middle of a prompt.
_ANCHORS = ("", "x")
_LONGEST = 32_768  # tokens of a prompt that a worker takes


def constant_prompt(processor: Any, style: PromptStyle) -> str:
    """Return a rendered prompt about images; without any, its part that is the same for all questions."""
    text, question = _rendered(processor, style)
    return text if style.images else plain_text_apart(processor.tokenizer, *_around(text, question))[0]


def _rendered(processor: Any, style: PromptStyle) -> tuple[str, str]:
    """Return a rendered prompt, and what stands for the question in it."""
    for question in STAND_INS:
        text = render(processor, style, question)
        if text.count(question) == 1:
            return text, question
    raise EngineStartError(f"{whose(style)} does not insert the question once: it renders {text!r}")


def _around(text: str, question: str) -> tuple[str, str]:
    before, _, after = text.partition(question)
    return before, after


def split_any_prompt(family: Family, style: PromptStyle, images: Sequence[np.ndarray]) -> PromptParts:
    """Cut the prompt of a style. Raises EngineStartError where the parts put together are not the processor's prompt."""
    processor = family.processor
    text, question = _rendered(processor, style)
    before, after = _around(text, question)
    changed = {probe for probe in PROBES if render(processor, style, probe) != before + probe + after}
    if any(render(processor, style, probe) != before + probe.strip() + after for probe in changed):
        raise EngineStartError(f"{whose(style)} does not insert the question as it is: use the base checkpoint's template")
    if images:
        inputs = _inputs(family, text, images)
        begin, tail = _cut(family, style, inputs)
        if tail.count(question) != 1:
            raise EngineStartError(f"{whose(style)} puts the question before the image, or its tokenizer changes it: {tail!r}")
        first, lead, trail, last = plain_text_apart(processor.tokenizer, *_around(tail, question))
        if len(begin) > min(_LONGEST, family.text.max_position_embeddings):
            what = f"{amount(style.images, 'small image')} take {len(begin):,} tokens"
            raise EngineStartError(f"{what}, more than the model takes")
        head = _beside_images(begin, family.image_id, style.images)
    else:
        first, lead, trail, last = "", *plain_text_apart(processor.tokenizer, before, after)[1:]
        begin = head = tuple(_inputs(family, constant_prompt(processor, style), ())["input_ids"][0].tolist())
        if not begin:
            raise EngineStartError(f"{whose(style)} has nothing that all questions without an image share")
    fixed = [tuple(processor.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (first, last)]
    digest = hashlib.sha256(text.encode()).hexdigest()
    tokenize = QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str(), placeholders(family))
    prompts = {probe: _inputs(family, render(processor, style, probe), images) for probe in PROBES}
    expected = {probe: made["input_ids"][0].tolist() for probe, made in prompts.items()}
    for anchor in _ANCHORS:
        parts = PromptParts(head, fixed[0], fixed[1], digest, lead, trail, bool(changed), anchor)
        if all([*begin, *parts.suffix(tokenize, probe)] == whole for probe, whole in expected.items()):
            return parts
    raise EngineStartError("its tokenizer merges the question with the template around it in a way that is not known here")


def _cut(family: Family, style: PromptStyle, inputs: Inputs) -> tuple[tuple[int, ...], str]:
    """Return the ids up to the end of the images, and the text after them. Raises EngineStartError."""
    ids = inputs["input_ids"][0].tolist()
    if family.image_id not in ids:
        raise EngineStartError(f"{whose(style)} has no place for {amount(style.images, 'image')}")
    end = family.cut(inputs)
    tail = family.processor.tokenizer.decode(ids[end:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tuple(ids[:end]), tail


def _beside_images(ids: Sequence[int], image_id: int, images: int) -> tuple[int, ...]:
    """Return the ids before and after images, and those between several, which may lie inside them too: at most so many."""
    where = [i for i, token in enumerate(ids) if token == image_id]
    between = [token for token in ids[where[0] : where[-1]] if token != image_id] if images > 1 else []
    return (*ids[: where[0]], *between, *ids[where[-1] + 1 :])


def placeholders(family: Family) -> tuple[str, ...]:
    """Return the tokens that stand for images, videos or sounds."""
    config = family.model.config
    owners = [config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)]
    ids = {
        found
        for owner in owners
        for kind in ("image", "video", "audio")
        for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id")
        if isinstance(found := getattr(owner, name, None), int)
    }
    return tuple(sorted(str(token) for token in family.processor.tokenizer.convert_ids_to_tokens(sorted(ids)) if token))


def _inputs(family: Family, text: str, images: Sequence[np.ndarray]) -> Inputs:
    try:
        return family.inputs(text, images)
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        raise EngineStartError(
            f"its processor cannot prepare {amount(len(images), 'small image')} with {text[:200]!r} ({in_a_line(error)}): its "
            "chat template, tokenizer and preprocessor_config.json must be those of one checkpoint"
        ) from error

"""A deterministic stand-in for the model: the same interface, vectors of hashes. For tests and development of the queue.

A mark in a question's text makes it go wrong, for tests of what then happens:

- `[kill]`: the process ends by SIGKILL; `[kill-in-company]`: only where the question shares its batch.
- `[hang]`: no answer ever.
- `[error]`: an exception; `[error:N]`: in company, and the first N times alone in this process.
- `[kill-exact]`, `[error-exact]`: the same, but only where it is to be computed exactly, as for a drift certificate.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from storage.fields import EVERY, QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, answer_field, at_layer
from storage.sample import Sample
from storage.settings import LAST_BLOCK
from workers.engine.interface import EngineSpec, ModelInfo, Request
from workers.engine.prompt import PLACEHOLDERS, PromptParts, PromptStyle
from workers.errors import EngineStartError

_WIDTH, _LAYERS, _FACTOR = 8, 4, 28
_KEPT_IMAGES = 32
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # token 3 + i is letter i; printable ASCII stands for itself
_OPENING = 3 + _ALPHABET.index("[")
_MARK = re.compile(r"\[(kill|kill-in-company|kill-exact|hang|error|error-exact)(?::(\d+))?\]")


class FakeEngine:
    """Computes each sample from the bytes of its request alone."""

    def __init__(self, spec: EngineSpec) -> None:
        self._images: OrderedDict[str, None] = OrderedDict()
        self._errors: Counter[tuple[int, ...]] = Counter()
        self._seconds = float(spec.kind.partition(":")[2] or 0)
        self._dtype = np.dtype(np.float32 if spec.dtype == "float32" else ml_dtypes.bfloat16)
        self.info = ModelInfo(
            model_type="fake",
            revision=spec.revision,
            config_sha256="0" * 64,
            num_hidden_layers=_LAYERS,
            hidden_size=_WIDTH,
            vision_hidden_size=_WIDTH,
            vision_encoder_definition=LAST_BLOCK,
            max_position_embeddings=32768,
            repetition_penalty=1.0,
            tokenizer_json=_byte_tokenizer().to_str(),
            placeholders=PLACEHOLDERS,
            prompt=PromptParts((0,), (1,), (2,), "0" * 64),
            factor=_FACTOR,
            min_pixels=_FACTOR * _FACTOR,
            max_pixels=1280 * _FACTOR * _FACTOR,
            most_image_tokens=None,
            held_tokens=0,
            max_batch_tokens=1 << 20,
            environment={
                "device": "cpu",
                "gpu": "",
                "attention_implementation": "fake",
                "attention_kernels": "fake",
                "batch_invariance": "bitwise",
                "library_versions": "fake",
            },
        )

    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request after the configured time, unless a question's mark says otherwise."""
        time.sleep(self._seconds)
        for request in requests:
            if _OPENING in request.suffix_ids:
                self._go_wrong(request, alone=len(requests) == 1)
        return self.compute(requests)

    def compute(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request at once, whatever is marked."""
        return [self._sample(request, len(requests)) for request in requests]

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return a prompt whose head is the style's letters; a template may be marked `[error]` or `[hang]`."""
        if (style.system, style.template) == (None, None):
            return self.info.prompt
        text = repr((style.system, style.template))
        if "[error]" in text:
            raise EngineStartError("the template is marked [error]")
        if "[hang]" in text:
            signal.pause()
        head = _byte_tokenizer().encode(text).ids
        return replace(self.info.prompt, head_ids=(0, *head), sha256=hashlib.sha256(text.encode()).hexdigest())

    def free_cache(self) -> None:
        """Forget which images were seen."""
        self._images.clear()

    def _go_wrong(self, request: Request, *, alone: bool) -> None:
        for mark, number in _MARK.findall("".join(_ALPHABET[i - 3] for i in request.suffix_ids if i >= 3)):
            kind = mark.removesuffix("-exact")
            if kind != mark and not request.recipe.exact:
                continue
            if kind == "kill" or (kind == "kill-in-company" and not alone):
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "hang":
                signal.pause()
            elif kind == "error":
                self._errors[request.suffix_ids] += alone
                if not number or not alone or self._errors[request.suffix_ids] <= int(number):
                    raise RuntimeError(f"the question is marked [{mark}]")

    def _sample(self, request: Request, batch_size: int) -> Sample:
        image = b"".join(one.tobytes() for one in request.images)
        style = request.recipe.system_prompt, request.recipe.chat_template
        question = image + repr(request.suffix_ids if style == (None, None) else (style, request.suffix_ids)).encode()
        vectors, length = {}, 1 + hashlib.sha256(question).digest()[0] % 4
        if request.images:
            vectors[VISION_ONLY.name] = self._vector(image, "vision_only")
            vectors[VISION_ENCODER.name] = self._vector(image, "vision_encoder")
        for layer in request.recipe.layers:
            if request.images:
                vectors[at_layer(VISION_TOKEN.name, layer)] = self._vector(image, f"vision {layer}")
            vectors[at_layer(QUERY_TOKEN.name, layer)] = self._vector(question, f"query {layer}")
            for kind in request.recipe.answer_states:
                tokens = [self._vector(question, f"answer {kind} {layer} {n}") for n in range(length)]
                vectors[at_layer(answer_field(kind), layer)] = np.stack(tokens) if kind == EVERY else tokens[0]
        facts: dict[str, Any] = {
            "finish_reason": "eos",
            "batch_size": batch_size,
            "image_prefix": "shared" if request.image_key in self._images else "computed",
        }
        if EVERY in request.recipe.answer_states:
            facts["num_answer_tokens"] = length
        self._images[request.image_key] = None
        if len(self._images) > _KEPT_IMAGES:
            self._images.popitem(last=False)
        return Sample(vectors, hashlib.sha256(question).hexdigest()[:8], facts)

    def _vector(self, content: bytes, field: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(field.encode() + content).digest()[:8])
        return np.random.default_rng(seed).standard_normal(_WIDTH, dtype=np.float32).astype(self._dtype)


def _byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={letter: 3 + i for i, letter in enumerate(_ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer

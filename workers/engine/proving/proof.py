"""The proof at load: vectors and first tokens against plain forwards of transformers, on two small images.

What the engine takes over from transformers (positions, masks, the shared prefix, a faster vision tower, the prompt's ids) is
so compared on every checkpoint before it serves, and what its files ask for and is not known here shows. `workers selfcheck`
compares more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage.fields import QUERY_TOKEN, VISION_TOKEN, by_layer
from storage.sample import Sample
from workers.checkpoint.identity import resolve_layers
from workers.engine.hooks import outputs
from workers.engine.interface import ModelInfo, Recipe, Request
from workers.engine.kernels import PlainAttention
from workers.engine.models.base import Family
from workers.engine.passes import vision_means, watched
from workers.engine.prompt import PromptParts, PromptStyle, QuestionTokenizer, render
from workers.errors import EngineStartError, in_a_line

# Of different lengths, so that a batch is padded; the second has what templates and tokenizers like to change.
QUESTIONS = ("Why?", "  How many RED shapes are\n in <this> picture? ")
_TOLERANCE = 1e-3  # max|a-b| / max|b| in float32, where 1e-5 is usual and a mistake gives 0.1
# In bfloat16 the two differ by roundings, as plain attention kernels do among themselves.
_NOISE_FACTOR, _ROUNDING = 2, 2.0**-4
_SHAPES = ((4, 10), (9, 5))  # of the two images, in blocks: wide and high, of different numbers of tokens
_NATS = {"float32": 1e-3, "bfloat16": 1.0}  # between two log-probabilities; a wrong factor of the logits gives several
_BLOCK = 28  # pixels, where images come in any size
# Images that show how many tokens one may take: squares and strips, small and large.
_TRIED = ((448, 448), (1344, 1344), (448, 1792), (1792, 448), (896, 1344), (1344, 896), (336, 2016), (2016, 336))

Vectors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Plain:
    """One prompt by transformers alone: its ids, its vectors, those under another attention kernel; its first token."""

    image: int
    question: str
    ids: tuple[int, ...]
    vectors: Vectors
    other_kernel: Vectors
    log_probabilities: npt.NDArray[np.float32]  # (V,), of the first token


def proof_images(family: Family, number: int = 2) -> list[npt.NDArray[np.uint8]]:
    """Return images of noise in blocks, uint8 [H, W, 3]."""
    block = family.factor or _BLOCK
    made = []
    for seed in range(number):
        shape = _SHAPES[seed % len(_SHAPES)]
        blocks = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
        made.append(blocks.repeat(block, axis=0).repeat(block, axis=1))
    return made


def most_image_tokens(family: Family, text: str, prompt: PromptParts, images: int = 1) -> int:
    """Return the most tokens that an image of one of several shapes becomes, where there are so many."""
    blank = (np.zeros((height, width, 3), np.uint8) for height, width in _TRIED)
    most = max(family.cut(family.inputs(text, [image] * images)) for image in blank)
    return -(-(most - len(prompt.head_ids)) // images)


@contextmanager
def refusing() -> Iterator[None]:
    """Raise EngineStartError for whatever transformers raises of files that do not fit together."""
    try:
        yield
    except (torch.OutOfMemoryError, EngineStartError):
        raise
    except Exception as error:  # of a class of its own for each thing that can be wrong
        raise EngineStartError(
            f"transformers cannot compute one small image with it ({in_a_line(error)}): its "
            "config.json, preprocessor_config.json and tokenizer must be those of one checkpoint"
        ) from error


@torch.inference_mode()
def plain_prompts(family: Family, style: PromptStyle = PromptStyle()) -> list[Plain]:
    """Run each question over two sets of images by transformers' own forward. Raises EngineStartError where it cannot."""
    found = []
    for number, images in enumerate(_sets(family, style.images)):
        for question in QUESTIONS:
            with refusing():
                inputs = family.inputs(render(family.processor, style, question), images)
                vectors, scores = _forward(family, inputs)
                other = vectors
                if family.model.dtype != torch.float32:
                    with PlainAttention():
                        other, _ = _forward(family, inputs)
            found.append(Plain(number, question, tuple(inputs["input_ids"][0].tolist()), vectors, other, scores))
    return found


def _sets(family: Family, number: int) -> list[tuple[npt.NDArray[np.uint8], ...]]:
    """Return two sets of so many images each."""
    images = proof_images(family, number + 1)
    return [tuple(images[:number]), tuple(images[1 : number + 1])]


def asked_again(
    plain: Sequence[Plain], family: Family, info: ModelInfo, layers: tuple[int, ...], max_new_tokens: int,
    parts: PromptParts | None = None, style: PromptStyle = PromptStyle(),
) -> list[Request]:  # fmt: skip
    """Return the prompts as the engine is asked them: `parts` of their style, None the checkpoint's own with one image."""
    tokenize, parts = QuestionTokenizer(info.tokenizer_json, info.placeholders), parts or info.prompt
    settings = {"system_prompt": style.system, "chat_template": style.template}
    recipe, sets = Recipe(layers=layers, max_new_tokens=max_new_tokens, **settings), _sets(family, style.images)
    suffixes = (parts.suffix(tokenize, one.question) for one in plain)
    keys = (f"proof {style.images} {one.image}" if style.images else "" for one in plain)
    return [Request(key, sets[one.image], suffix, len(one.ids), recipe) for one, key, suffix in zip(plain, keys, suffixes)]


def is_invariant(requests: Sequence[Request], extract: Callable[[Sequence[Request]], list[Sample]]) -> bool:
    """Tell whether questions give the same bits together, in another order and each alone. `extract` keeps nothing."""
    together = extract(requests)
    reordered = extract(requests[::-1])[::-1]
    alone = [extract([request])[0] for request in requests]
    return all(_same_bits(one, other) for others in (reordered, alone) for one, other in zip(together, others, strict=True))


def _same_bits(one: Sample, other: Sample) -> bool:
    kept = ("answer_token_ids", "answer_token_logprobs")
    same = all(
        np.array_equal(vector.view(np.uint8), other.vectors[name].view(np.uint8)) for name, vector in one.vectors.items()
    )
    return same and all(one.facts[name] == other.facts[name] for name in kept)


def refuse_difference(
    plain: Sequence[Plain], family: Family, info: ModelInfo, extract: Callable[[list[Request]], list[Sample]],
    parts: PromptParts | None = None, style: PromptStyle = PromptStyle(),
) -> None:  # fmt: skip
    """Have the engine compute the same. Raises EngineStartError where its prompts, vectors or first tokens are others."""
    requests = asked_again(plain, family, info, resolve_layers(None, info.num_hidden_layers), 1, parts, style)
    for sample, one in zip(extract(requests), plain, strict=True):
        if sample.facts["seq_len"] != len(one.ids):
            raise EngineStartError(
                "its prompt is another here than its processor's: the files of its tokenizer, its chat template and "
                "preprocessor_config.json must be those of one checkpoint"
            )
        dtype = str(family.model.dtype).removeprefix("torch.")
        for name, vector in sample.vectors.items():
            if name in one.vectors:
                compare(name, vector.astype(np.float32), one.vectors[name], one.other_kernel[name], dtype)
        [token] = sample.facts["answer_token_ids"]
        scored = np.float32(sample.facts["answer_token_logprobs"][0])
        if not abs(scored - one.log_probabilities[token]) <= _NATS[dtype]:  # NaN too
            raise EngineStartError(
                f"its first token has the log-probability {scored:.4f} here and {one.log_probabilities[token]:.4f} by "
                "transformers: something in its config.json is not served here. Please report it, with that file"
            )


def _forward(family: Family, inputs: Any) -> tuple[Vectors, npt.NDArray[np.float32]]:
    layers = resolve_layers(None, len(family.layers))
    # Of many images, the scores of every token would take gigabytes.
    last = {name: 1 for name in ("logits_to_keep",) if name in inspect.signature(family.model.forward).parameters}
    # Copies: Qwen3-VL adds to the states in place, after its first layers, in transformers 4.57.
    with (
        outputs({i: family.layers[i] for i in layers}, torch.clone) as captured,
        outputs(family.vision_modules(), family.of_tower) as vision,
        watched(family) as seen,
        family.ending() as ended,
    ):
        out = family.model(**family.on_device(inputs), **last)
    family.learn_scores(ended[-1][:, -1], out.logits[:, -1])
    vectors = by_layer(QUERY_TOKEN, {i: captured[i][0, -1] for i in layers})  # (1, L, D) -> (D,)
    where = (inputs["input_ids"][0] == family.image_id).nonzero()
    if len(where):
        vectors |= by_layer(VISION_TOKEN, {i: captured[i][0, int(where[-1])] for i in layers})
    vectors |= vision_means(family, vision, seen, inputs)[0]
    scores: npt.NDArray[np.float32] = out.logits[0, -1].float().log_softmax(-1).cpu().numpy()
    return {name: vector.float().cpu().numpy() for name, vector in vectors.items()}, scores


def compare(name: str, ours: Any, plain: Any, other: Any, dtype: str) -> None:
    """Raise EngineStartError where a vector is further from the plain one than another attention kernel explains."""
    if not np.isfinite(plain).all():
        raise EngineStartError(
            f"its {name} has values that are not finite in {dtype}, though its weights have none: use --dtype float32, "
            "or another checkpoint"
        )
    error, noise = _relative(ours, plain), _relative(other, plain)
    bound = _TOLERANCE if dtype == "float32" else max(_ROUNDING, _NOISE_FACTOR * noise)
    if not error <= bound:  # NaN too
        raise EngineStartError(
            f"its {name} is {error:.2g} away from a plain forward of transformers on one small image (at most {bound:.2g}): "
            "something in its config.json is not served here. Please report it, with that file"
        )


def _relative(vector: Any, expected: Any) -> float:
    return float(np.abs(vector - expected).max() / max(np.abs(expected).max(), 1e-30))

"""The proof at load: the engine's vectors against a plain forward of transformers, on one small image.

What the engine takes over from transformers (positions, masks, the shared prefix, the vision windows, the prompt's ids) is
so compared on every checkpoint before it serves, and what its files ask for and is not known here shows. It costs three or
four forwards of fifty tokens. `workers selfcheck` compares more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.fields import QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, by_layer
from storage.sample import Sample
from workers.checkpoint.identity import resolve_layers
from workers.engine.hooks import outputs
from workers.engine.interface import ModelInfo, Recipe, Request
from workers.engine.kernels import PlainAttention
from workers.engine.prompt import QuestionTokenizer
from workers.errors import EngineStartError, in_a_line

_SIDES = (2, 14)  # of the image, in merged tokens: height and width differ much, so that a confusion shows
# Of different lengths, so that a batch is padded; the second has what templates and tokenizers like to change.
QUESTIONS = ("Why?", "  How many RED shapes are\n in <this> picture? ")
_TOLERANCE = 1e-3  # max|a-b| / max|b| in float32, where 1e-5 is usual and a mistake gives 0.1
# In bfloat16 the two differ by roundings, as plain attention kernels do among themselves.
_NOISE_FACTOR, _ROUNDING = 2, 2.0**-4

Vectors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Plain:
    """One prompt by transformers alone: its ids, its vectors, and those under another attention kernel."""

    ids: tuple[int, ...]
    vectors: Vectors
    other_kernel: Vectors


def small_image(factor: int) -> npt.NDArray[np.uint8]:
    """Return an image of noise in blocks, uint8 [H, W, 3]."""
    rows, columns = (side * 2 for side in _SIDES)
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    return blocks.repeat(factor // 2, axis=0).repeat(factor // 2, axis=1)


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
def plain_prompts(model: Any, processor: Any) -> list[Plain]:
    """Run the questions by the official path, before the engine changes anything in the model.

    Raises EngineStartError where transformers itself cannot.
    """
    vision = model.config.vision_config
    image = small_image(vision.patch_size * vision.spatial_merge_size)
    found = []
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        with refusing():
            inputs = processor(text=[text], images=[image], do_resize=False, return_tensors="pt")
            inputs = inputs.to(model.get_input_embeddings().weight.device)
            vectors = _forward(model, inputs, nullcontext())
            other = vectors if model.dtype == torch.float32 else _forward(model, inputs, PlainAttention())
        found.append(Plain(tuple(inputs["input_ids"][0].tolist()), vectors, other))
    return found


def refuse_difference(
    plain: Sequence[Plain], info: ModelInfo, image_token: int, extract: Callable[[list[Request]], list[Sample]]
) -> None:
    """Have the engine compute the same. Raises EngineStartError where its prompts or vectors are others."""
    assert info.factor is not None
    pixels, recipe = small_image(info.factor), Recipe(layers=resolve_layers(None, info.num_hidden_layers), max_new_tokens=0)
    tokenize = QuestionTokenizer(info.tokenizer_json)
    requests = []
    for question, one in zip(QUESTIONS, plain, strict=True):
        suffix = info.prompt.suffix(tokenize, question)
        ids = (*info.prompt.head_ids, *[image_token] * (_SIDES[0] * _SIDES[1]), *suffix)
        if ids != one.ids:
            raise EngineStartError(
                "its prompt is another here than its processor's: the files of its tokenizer, its chat template and "
                "preprocessor_config.json must be those of one checkpoint"
            )
        requests.append(Request("", pixels, suffix, len(ids), recipe))
    for sample, one in zip(extract(requests), plain, strict=True):
        for name, vector in sample.vectors.items():
            compare(name, vector.astype(np.float32), one.vectors[name], one.other_kernel[name], vector.dtype.name)


def _forward(model: Any, inputs: Any, kernel: AbstractContextManager[Any]) -> Vectors:
    decoder, visual = model.model.language_model, model.model.visual
    layers = resolve_layers(None, len(decoder.layers))
    modules = {i: decoder.layers[i] for i in layers} | {-1: visual.merger, -2: visual.blocks[-1]}
    with kernel, outputs(modules, lambda out: out) as captured:
        model(**inputs)
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1])
    means = {VISION_ONLY.name: captured[-1].mean(0), VISION_ENCODER.name: captured[-2].mean(0)}
    vision = by_layer(VISION_TOKEN, {i: captured[i][0, last] for i in layers})  # (1, L, D) -> (D,)
    query = by_layer(QUERY_TOKEN, {i: captured[i][0, -1] for i in layers})
    return {name: _array(vector) for name, vector in (means | vision | query).items()}


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


def _array(vector: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = vector.float().cpu().numpy()
    return array

"""The fields: the vectors that a part has of a question, by name, with what they are of and how wide they are.

A field with layers is stored as one vector for each: `query_token_representation/layer_21`. A new field is one entry here, its
width, and the engine's line that takes it; what reads parts goes by these functions. Those of the answer's tokens have a kind
too: `answer_token_representation/last/layer_21`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Vector = TypeVar("Vector")


@dataclass(frozen=True, slots=True)
class Field:
    """What is known of a field beforehand."""

    name: str
    words: str
    of_image: bool  # the same for all questions of an image, unless the published positions are asked for
    of_answer: bool = False  # read after generation
    ragged: bool = False  # a vector for each token of the answer: [T, D]


VISION_ONLY = Field("vision_only_representation", "vision only", of_image=True)
VISION_ENCODER = Field("vision_encoder_representation", "vision encoder", of_image=True)
VISION_TOKEN = Field("vision_token_representation", "vision token", of_image=True)
QUERY_TOKEN = Field("query_token_representation", "query token", of_image=False)
ANSWER_TOKEN = "answer_token_representation"
EVERY = "all"
ANSWER_STATES = ("first", "last", "mean", EVERY)  # of an answer's tokens
_OF_ANSWERS = tuple(
    Field(f"{ANSWER_TOKEN}/{kind}", f"answer {kind}", of_image=False, of_answer=True, ragged=kind == EVERY)
    for kind in ANSWER_STATES
)
FIELDS = {field.name: field for field in (VISION_ONLY, VISION_ENCODER, VISION_TOKEN, QUERY_TOKEN, *_OF_ANSWERS)}


def answer_field(kind: str) -> str:
    """Return the name of the field of an answer's first or last token, of the mean over its tokens, or of all of them."""
    return f"{ANSWER_TOKEN}/{kind}"


def widths(
    hidden_size: int, vision_encoder: int | None, layers: Iterable[int], *, vision_only: int | None = None,
    answer_states: Iterable[str] = (), images: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Return the vectors that a question has: name to width.

    `vision_encoder`: of the vision tower; None: it is not kept. `vision_only` None: as wide as the decoder. `images`: whether
    the question is about any.
    """
    found = {VISION_ONLY.name: vision_only or hidden_size} if images else {}
    if images and vision_encoder is not None:
        found[VISION_ENCODER.name] = vision_encoder
    chosen = tuple(layers)
    names = [*([VISION_TOKEN.name] if images else []), QUERY_TOKEN.name, *map(answer_field, answer_states)]
    return found | {at_layer(name, k): hidden_size for name in names for k in chosen}


def is_of_image(name: str) -> bool:
    """Tell whether a vector is of a question's image: a question without one has none."""
    field, _ = split_layer(name)
    return field in FIELDS and FIELDS[field].of_image


def is_ragged(name: str) -> bool:
    """Tell whether a question has of it a vector for each token of its answer, [T, D]."""
    field, _ = split_layer(name)
    return field in FIELDS and FIELDS[field].ragged


def at_layer(name: str, layer: int | None) -> str:
    """Return the name of a field's vector at a layer: `query_token_representation` and 21 are `…/layer_21`."""
    return name if layer is None else f"{name}/layer_{layer}"


def by_layer(field: Field, vectors: Mapping[int, Vector]) -> dict[str, Vector]:
    """Return a field's vectors by the names that they have in a part."""
    return {at_layer(field.name, layer): vector for layer, vector in vectors.items()}


def split_layer(name: str) -> tuple[str, int | None]:
    """Return the field and the layer of a vector's name: the inverse of `at_layer`."""
    field, _, layer = name.rpartition("/layer_")
    return (field, int(layer)) if layer.isdecimal() else (name, None)


def values_of(widths: Mapping[str, int], tokens: int) -> int:
    """Return how many numbers a question's vectors have, with an answer of so many tokens."""
    return sum(width * (tokens if is_ragged(name) else 1) for name, width in widths.items())


def in_order(name: str) -> tuple[str, int]:
    """Return what sorts vectors by field and then by layer: `layer_7` comes before `layer_14`."""
    field, layer = split_layer(name)
    return field, -1 if layer is None else layer


def in_words(name: str) -> str:
    """Return a vector's name in words: `query token 21`."""
    field, layer = split_layer(name)
    said = FIELDS[field].words if field in FIELDS else field.replace("_representation", "").replace("_", " ")
    return said if layer is None else f"{said} {layer}"

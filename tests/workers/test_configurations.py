"""The published sizes, 3B to 72B: real widths and heads, few layers and a small vocabulary, against the reference."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from workers.checkpoint.identity import resolve_layers
from workers.checks.reference import Reference
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import SmallModelSpec
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.model import ModelEngine
from workers.extract.preprocess import Preprocessor

pytestmark = pytest.mark.slow

VISION_HIDDEN = 1280  # of every size, with 16 heads and 32 blocks, of which four see the whole image
QUESTION = "What is in the image?"


@dataclass(frozen=True)
class Published:
    """What a released config.json says of the language model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    vision_intermediate_size: int
    default_layers: tuple[int, ...]


PUBLISHED = {
    "3B": Published(2048, 36, 16, 2, True, 3420, (0, 9, 18, 27, 35)),
    "7B": Published(3584, 28, 28, 4, False, 3420, (0, 7, 14, 21, 27)),
    "32B": Published(5120, 64, 40, 8, False, 3456, (0, 16, 32, 48, 63)),
    "72B": Published(8192, 80, 64, 8, False, 3456, (0, 20, 40, 60, 79)),
}


def small(size: Published) -> SmallModelSpec:
    """Two vision blocks and one or two decoder layers with a narrow MLP, whose width nothing here depends on."""
    return SmallModelSpec(
        hidden_size=size.hidden_size,
        intermediate_size=256,
        num_hidden_layers=1 if size.hidden_size > 8000 else 2,  # one of 72B has 600 MB in float32
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        vision_hidden_size=VISION_HIDDEN,
        vision_intermediate_size=size.vision_intermediate_size,
        vision_depth=2,
        vision_heads=16,
        fullatt_block_indexes=(1,),
        tie_word_embeddings=size.tie_word_embeddings,
        dtype="bfloat16",  # as published; half the bytes
        attention_gain=1.0,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_computed_right(name: str, tmp_path: Path, photographs: Path) -> None:
    size = PUBLISHED[name]
    model = build_small_model(tmp_path / f"Qwen2.5-VL-{name}-Instruct", small(size))
    layers = tuple(range(small(size).num_hidden_layers))
    assert json.loads((model / "config.json").read_text())["rope_scaling"]["mrope_section"] == [16, 24, 24]
    engine = ModelEngine(EngineSpec("model", str(model), "main", "float32", "unused"))
    info = engine.info
    assert (info.num_hidden_layers, info.hidden_size, info.vision_hidden_size) == (
        len(layers),
        size.hidden_size,
        VISION_HIDDEN,
    )

    limits = (info.min_pixels, 28 * 28 * 12)
    preprocess = Preprocessor(info)
    image = preprocess.image("chelsea.jpg", photographs, (), limits)
    [sample] = engine.extract([preprocess.request([image], QUESTION, Recipe(layers=layers, max_new_tokens=3))])
    del engine
    gc.collect()
    reference = Reference(model, min_pixels=limits[0], max_pixels=limits[1])
    expected = reference(photographs / "chelsea.jpg", QUESTION, max_new_tokens=3, layers=layers)
    assert {vector.shape for field, vector in sample.vectors.items() if "encoder" not in field} == {(size.hidden_size,)}
    assert sample.vectors["vision_encoder_representation"].shape == (VISION_HIDDEN,)
    assert len(sample.vectors) == 2 + 2 * len(layers)
    for field, vector in sample.vectors.items():
        assert np.isfinite(vector).all()
        assert np.abs(vector - expected[field]).max() < 1e-4 * np.abs(expected[field]).max(), field
    assert sample.facts["answer_token_ids"] == expected["answer_token_ids"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_default_layers_of_a_published_size(name: str) -> None:
    assert resolve_layers(None, PUBLISHED[name].num_hidden_layers) == PUBLISHED[name].default_layers

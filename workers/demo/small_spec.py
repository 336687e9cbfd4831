"""Sizes and temper of the small models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SmallModelSpec:
    """Name the sizes and the temper of one small checkpoint; the same spec gives the same bytes.

    `expressive` replaces the default initialisation, under which a model ignores positions and masks and answers every
    question alike, by peaked attention (`attention_gain` is the standard deviation of queries and keys), random biases
    and norm weights; without it, weights have the standard deviation `initializer_range`. `end_gain` enlarges the
    end-of-turn row of the head: higher values end more answers early. `word_gain` enlarges the rows of whole words, so
    that answers read as words.
    """

    hidden_size: int = 128
    intermediate_size: int = 576
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 172  # like the 7B's 3420, no multiple of 8
    vision_depth: int = 4
    vision_heads: int = 4
    fullatt_block_indexes: tuple[int, ...] = (1, 3)
    window_size: int = 112
    min_pixels: int = 3136
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    seed: int = 0
    initializer_range: float = 0.02
    expressive: bool = True
    attention_gain: float = 2.0
    end_gain: float = 2.2
    word_gain: float = 1.0


DEMO = SmallModelSpec(end_gain=3.8, word_gain=1.5)
BENCH = SmallModelSpec(
    hidden_size=512, intermediate_size=1536, num_attention_heads=8,
    vision_hidden_size=320, vision_intermediate_size=856, vision_depth=8, vision_heads=8, fullatt_block_indexes=(3, 7),
)  # fmt: skip
TEST = SmallModelSpec(
    hidden_size=64, intermediate_size=160, num_hidden_layers=7,
    vision_hidden_size=32, vision_intermediate_size=84, vision_heads=2, tie_word_embeddings=False, seed=1,
)  # fmt: skip
PRESETS = {"demo": DEMO, "bench": BENCH, "test": TEST}

"""The small models' weights: seeded noise by the published names, shaped so that errors of position and mask show."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workers.demo.small_spec import SmallModelSpec

if TYPE_CHECKING:
    import numpy as np

_UNSAID = ("fuck", "shit", "sex", "porn", "erot", "rape", "nazi", "kill")  # the demo's answers are shown to people


def save_weights(path: Path, spec: SmallModelSpec, ranks: dict[bytes, int], ids: dict[str, int]) -> None:
    """Write the weights of a spec; `ranks` and `ids` are the tokenizer\'s."""
    import torch
    from safetensors.torch import save

    dtype: torch.dtype = getattr(torch, spec.dtype)
    rows = _head_rows(spec, ranks, ids)
    tensors = {}
    for name, shape in _shapes(spec, vocab_size_of(ids)):
        values = _sample(name, shape, spec)
        if spec.expressive and (name == "lm_head.weight" or (spec.tie_word_embeddings and "embed_tokens" in name)):
            values *= rows[:, None]
        tensors[name] = torch.from_numpy(values).to(dtype)
    path.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would leave it readable by its owner only


def _shapes(spec: SmallModelSpec, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's published name and shape; transformers 4.52 and later rename them as they load."""
    width, inner = spec.vision_hidden_size, spec.vision_intermediate_size
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for block in (f"visual.blocks.{i}" for i in range(spec.vision_depth)):
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.gate_proj", inner, width)
        yield from _linear(f"{block}.mlp.up_proj", inner, width)
        yield from _linear(f"{block}.mlp.down_proj", width, inner)
    yield "visual.merger.ln_q.weight", (width,)
    yield from _linear("visual.merger.mlp.0", 4 * width, 4 * width)
    yield from _linear("visual.merger.mlp.2", spec.hidden_size, 4 * width)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    shared = hidden // spec.num_attention_heads * spec.num_key_value_heads
    yield "model.embed_tokens.weight", (vocab_size, hidden)
    for layer in (f"model.layers.{i}" for i in range(spec.num_hidden_layers)):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        yield from _linear(f"{layer}.self_attn.k_proj", shared, hidden)
        yield from _linear(f"{layer}.self_attn.v_proj", shared, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (vocab_size, hidden)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _sample(name: str, shape: tuple[int, ...], spec: SmallModelSpec) -> np.ndarray:
    """Draw one tensor; the generator depends on seed and name only, so that a new tensor moves no other."""
    import numpy as np

    random = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    noise: np.ndarray = random.standard_normal(shape, dtype=np.float32)
    is_norm = "norm" in name or "ln_q" in name
    if not spec.expressive:
        noise *= 0.0 if is_norm or name.endswith(".bias") else spec.initializer_range
        noise += is_norm
        return noise
    if name == "model.norm.weight":
        # Both signs, so that a tied head does not find the last token's own embedding in the state and repeat it.
        noise *= 0.3
        noise += np.copysign(1.0, noise)
    elif is_norm:
        noise *= 0.3
        noise += 1.0
        noise.clip(0.2, 2.0, out=noise)
    elif name.endswith(".bias"):
        noise *= 0.3
    elif "embed_tokens" not in name:
        noise *= math.prod(shape[1:]) ** -0.5  # a sum over the inputs keeps their variance
    if ".q_proj." in name or ".k_proj." in name:
        noise *= spec.attention_gain
    if ".qkv." in name:
        noise[: 2 * spec.vision_hidden_size] *= spec.attention_gain  # queries and keys, not values
    return noise


def _head_rows(spec: SmallModelSpec, ranks: dict[bytes, int], ids: dict[str, int]) -> np.ndarray:
    """Return each vocabulary row's factor: words and the end of turn up, other added tokens down, padding out."""
    import numpy as np

    rows = np.zeros(vocab_size_of(ids), dtype=np.float32)
    for token, rank in ranks.items():
        is_word = len(token) > 3 and token[:1] == b" " and token[1:].isalpha() and token.isascii()
        rows[rank] = spec.word_gain if is_word and not any(stem.encode() in token.lower() for stem in _UNSAID) else 1.0
    for name, i in ids.items():
        rows[i] = spec.end_gain if name == "<|im_end|>" else 0.2
    return rows


def vocab_size_of(ids: dict[str, int]) -> int:
    """Round the vocabulary up past the tokenizer's last id, as the published checkpoints do."""
    return -(-(max(ids.values()) + 1) // 64) * 64

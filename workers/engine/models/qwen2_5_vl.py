"""Qwen2.5-VL: the vision tower, from resized pixels to merged tokens and their means, windows of equal length in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from workers.engine.hooks import outputs


class Family:
    """How it is loaded: it has an engine of its own, in `shared_prefix.py`."""

    AUTO = Qwen2_5_VLForConditionalGeneration


@dataclass(slots=True)
class Image:
    """An image after the vision tower."""

    tokens: Tensor  # (tokens, D)
    grid: tuple[int, int, int]  # in patches: time, height, width
    merged_mean: Tensor  # (D,)
    encoder_mean: Tensor  # (E,)


class VisionTower:
    """The tower of a loaded model, with its image processor."""

    def __init__(self, visual: Any, processor: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._visual = visual
        self._processor = processor
        self._dtype = dtype
        self._device = device
        self._merge = visual.spatial_merge_size**2
        windows = _Windows()
        for block in visual.blocks:
            block.attn.forward = _BatchedWindowAttention(block.attn, windows)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Image]:
        """Run images, each uint8 [H, W, 3] of a size that the model takes, in one call."""
        patches = self._processor(images=list(pixels), do_resize=False, return_tensors="pt")
        grid = patches["image_grid_thw"].to(self._device)
        states = patches["pixel_values"].to(self._device, self._dtype)
        with outputs({0: self._visual.blocks[-1]}, lambda out: out) as captured:
            out = self._visual(states, grid_thw=grid)
        merged = out if isinstance(out, Tensor) else out.pooler_output  # (tokens, D); an output object since 5.0
        sizes: list[int] = grid.prod(dim=1).tolist()
        # The last block's rows are in window order, but each image's rows stay together.
        encoded = torch.split(captured[0], sizes)  # each (patches, E)
        tokens = torch.split(merged, [size // self._merge for size in sizes])  # each (tokens, D)
        return [Image(t, tuple(g), t.mean(0), e.mean(0)) for t, e, g in zip(tokens, encoded, grid.tolist())]


class _Windows:
    """Which rows make the windows of each length; the same boundaries serve every block of a forward."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[Tensor]]] = []

    def of(self, boundaries: Tensor) -> list[Tensor]:
        """Return row indices (windows, length), one tensor per length."""
        for known, rows in self._known:
            if known is boundaries:
                return rows
        starts, lengths = boundaries[:-1], boundaries.diff()
        rows = []
        for length in sorted(set(lengths.tolist())):
            if length:
                rows.append(starts[lengths == length][:, None] + torch.arange(length, device=boundaries.device))
        self._known = [*self._known[-1:], (boundaries, rows)]  # a forward has two: of windows and of images
        return rows


class _BatchedWindowAttention:
    """An attention module's forward: transformers calls sdpa once per window, in Python; this calls it once per length."""

    def __init__(self, attention: Any, windows: _Windows) -> None:
        self._attention = attention
        self._windows = windows

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        attention = self._attention
        rows = hidden_states.shape[0]
        query, key, value = attention.qkv(hidden_states).reshape(rows, 3, attention.num_heads, -1).unbind(1)  # (N, heads, d)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        result = torch.empty_like(query)
        for index in self._windows.of(cu_seqlens):
            q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))  # (windows, heads, length, d)
            result[index] = scaled_dot_product_attention(q, k, v, scale=attention.scaling).transpose(1, 2)
        out: Tensor = attention.proj(result.reshape(rows, -1))
        return out


def prefix_positions(head: int, grid: tuple[int, int, int], merge_size: int) -> Tensor:
    """Return mRoPE positions of [head | image], (3, H + tokens): text counts on, an image token is at (row, column)."""
    height, width = grid[1] // merge_size, grid[2] // merge_size
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + head
    return torch.cat([torch.arange(head).expand(3, -1), image], dim=1)

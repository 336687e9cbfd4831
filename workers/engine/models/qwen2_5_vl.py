"""Qwen2.5-VL: its tower's windows of equal length in one call. Prompts are cut behind the last image token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from workers.engine.models import qwen_vl
from workers.engine.models.base import Inputs
from workers.engine.prompt import PromptParts, PromptStyle, split_prompt


class Family(qwen_vl.Family):
    """Like its relatives', but for a faster tower."""

    AUTO = Qwen2_5_VLForConditionalGeneration

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style, by its template, whose shape is known."""
        return split_prompt(self.processor, style)

    def cut(self, inputs: Inputs) -> int:
        """Return where an image's part of a prompt ends: the token that closes an image is of what follows."""
        return int((inputs["input_ids"][0] == self.image_id).nonzero()[-1]) + 1

    def speed_up(self) -> None:
        """Batch the windows too, and round the width of the perceptrons up to what a GPU likes."""
        super().speed_up()
        batch_windows(self.core.visual)
        if self.core.visual.device.type == "cuda":
            for block in self.core.visual.blocks:
                widen(block.mlp)


def batch_windows(visual: Any) -> None:
    """Have a tower's attention take windows of equal length in one call."""
    windows = _Windows()
    for block in visual.blocks:
        block.attn.forward = _BatchedWindowAttention(block.attn, windows)


def widen(perceptron: Any, multiple: int = 64) -> None:
    """Pad a gated perceptron's inner width with zeros, which add nothing: of the 7B's tower, 3420 to 3456."""
    up, down = (perceptron.gate_proj, perceptron.up_proj), perceptron.down_proj
    short = -up[0].out_features % multiple
    for linear in up:
        linear.weight = torch.nn.Parameter(pad(linear.weight, (0, 0, 0, short)), requires_grad=False)
        linear.out_features += short
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(pad(linear.bias, (0, short)), requires_grad=False)
    down.weight = torch.nn.Parameter(pad(down.weight, (0, short)), requires_grad=False)
    down.in_features += short


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

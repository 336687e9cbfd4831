"""Qwen2.5-VL: gated perceptrons in its tower. Prompts are cut behind the last image token."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Qwen2_5_VLForConditionalGeneration

from workers.engine.models import qwen_vl
from workers.engine.models.base import Inputs
from workers.engine.prompt import PromptParts, PromptStyle, split_prompt


class Family(qwen_vl.Family):
    """Like its relatives', but for a faster tower."""

    AUTO = Qwen2_5_VLForConditionalGeneration

    def prompt(self, style: PromptStyle) -> PromptParts | None:
        """Return the prompt of a style with one image, by its template, whose shape is known."""
        return split_prompt(self.processor, style) if style.images == 1 else None

    def cut(self, inputs: Inputs) -> int:
        """Return where an image's part of a prompt ends: the token that closes an image is of what follows."""
        return int((inputs["input_ids"][0] == self.image_id).nonzero()[-1]) + 1

    def speed_up(self) -> None:
        """Round the width of the perceptrons up too, to what a GPU likes."""
        super().speed_up()
        if self.core.visual.device.type == "cuda":
            for block in self.core.visual.blocks:
                widen(block.mlp)


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

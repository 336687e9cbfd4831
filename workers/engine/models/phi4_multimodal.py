"""Phi-4 multimodal: a causal language model that embeds images itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Its decoder is the whole model."""

    AUTO = AutoModelForCausalLM

    def tower(self) -> Any:
        """Return the vision tower's last block."""
        return base.last_block(self.core.embed_tokens_extend.image_embed.img_processor)

    def published_vision(self, tower: Tensor, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (width,) of each column of pixels, over crops, colours and rows: the published one is no feature."""
        return self.on_device(inputs)["image_pixel_values"][0].flatten(0, -2).mean(0)

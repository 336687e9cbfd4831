"""Phi-4 multimodal: a causal language model that embeds images itself."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from workers.engine.models import base


class Family(base.Family):
    """Its decoder is the whole model."""

    AUTO = AutoModelForCausalLM

    def tower(self) -> Any:
        """Return the vision tower's last block."""
        return base.last_block(self.core.embed_tokens_extend.image_embed.img_processor)

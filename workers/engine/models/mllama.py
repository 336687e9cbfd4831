"""Llama 3.2 Vision: the image is one token, and some layers attend to its tiles beside the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Later tokens see the tiles that the image's token sees."""

    encoder_definition = "tower_of_real_tiles"

    def kept_of(self, inputs: Inputs) -> Tensor | None:
        """Return which tiles are real, (1, 1, images, tiles)."""
        return inputs["cross_attention_mask"][:, -1:].to(self.model.device)

    def step(self, extra: Tensor | None, width: int) -> dict[str, Any]:
        """Return the masks of the layers that attend to tiles."""
        assert extra is not None
        mask, rows = _prepare_cross_attention_mask(
            extra.expand(-1, width, -1, -1), num_vision_tokens=self.core.vision_model.num_patches, dtype=self.model.dtype
        )
        return {"cross_attention_mask": mask, "full_text_row_masked_out_mask": rows}

    def tower(self) -> Any:
        """Return the vision model: its output joins the last layer with some before."""
        return self.core.vision_model

    def encoder_mean(self, out: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (E,) over the patches and class tokens of the tiles that hold some of the image."""
        real = inputs["aspect_ratio_mask"].bool()  # (1, images, tiles)
        return out.reshape(*real.shape, -1, out.shape[-1])[real.to(out.device)].flatten(0, 1).mean(0)

    def published_vision(self, tower: Tensor, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (E,) over all tiles, empty ones too."""
        return super().encoder_mean(tower, inputs)

    def projector(self) -> Any:
        """Return the module whose output the text attends to."""
        return self.core.multi_modal_projector

    def merged_means(self, out: Tensor, inputs: Inputs, prompts: int) -> list[Tensor]:
        """Return the mean (D,) of what the text attends to: the same tiles, projected."""
        return [self.encoder_mean(out, inputs)]

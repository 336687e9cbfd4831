"""LLaVA-NeXT: tiles of an image with row breaks between them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Differs from the defaults in the published feature alone."""

    def published_vision(self, tower: Tensor, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Return each image token's mean over its own dimensions, (most image tokens,): zeros fill it up."""
        means = embedded[0, (inputs["input_ids"][0] == self.image_id).to(embedded.device)].mean(-1)
        return pad(means, (0, self._most_tokens() - len(means)))

    def _most_tokens(self) -> int:
        """Return how many tokens the largest image becomes: the whole of it, and the best fit of tiles with row breaks."""
        config = self.model.config
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        rows = side // patch
        grids = ((height // side * rows, width // side * rows) for height, width in config.image_grid_pinpoints)
        return int(rows * rows + max(height * (width + 1) for height, width in grids))

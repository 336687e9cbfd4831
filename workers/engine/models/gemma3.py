"""Gemma 3: a vision tower whose output is normed after its last block."""

from __future__ import annotations

from torch import Tensor

from workers.engine.models import base
from workers.engine.models.base import Inputs


class Family(base.Family):
    """Differs from the defaults in the published feature alone."""

    def published_vision(self, tower: Tensor, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (E,) over the patches of the tower's normed output."""
        [norm] = (module for name, module in self.core.vision_tower.named_modules() if name.endswith("post_layernorm"))
        normed: Tensor = norm(tower)
        return normed.flatten(0, -2).mean(0)

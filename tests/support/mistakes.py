"""Mistakes of the engine that its tests must find: each patches one in. A check is worth what it would catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workers.engine.decoding import slot_cache
from workers.engine.models import qwen_vl
from workers.engine.passes import Passes
from workers.engine.prefixes import Prefixes


def one_dimensional(patch: pytest.MonkeyPatch) -> None:
    """Count text after an image on from the number of tokens."""
    original = Passes.run

    def run(self: Any, inputs: Any, *rest: Any) -> Any:
        vectors, batch, final = original(self, inputs, *rest)
        batch.next_position = torch.tensor([inputs["input_ids"].shape[1]])
        return vectors, batch, final

    patch.setattr(Passes, "run", run)


def suffix_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Begin the question a position late."""
    original = Prefixes.run

    def prefill(self: Prefixes, images: Any, recipe: Any) -> Any:
        prefixes = original(self, images, recipe)
        for prefix in prefixes:
            prefix.row.next_position += 1
        return prefixes

    patch.setattr(Prefixes, "run", prefill)


def lengths_ignored(patch: pytest.MonkeyPatch) -> None:
    """Attend in a slot to whatever is there."""
    original = slot_cache._seen_by
    patch.setattr(slot_cache, "_seen_by", lambda *where: torch.ones_like(original(*where)))


def padding_mask_ignored(patch: pytest.MonkeyPatch) -> None:
    """Attend to padding, where questions are padded."""
    original = Passes.step

    def step(self: Passes, batch: Any, ids: Any, positions: Any, lengths: Any, recipe: Any) -> Any:
        return original(self, batch, ids, positions, [ids.shape[1]] * len(lengths), recipe)

    patch.setattr(Passes, "step", step)


def windows_ignored(patch: pytest.MonkeyPatch) -> None:
    """Have all patches of an image see each other in every layer of the tower."""
    original = qwen_vl._SpansOf.of
    patch.setattr(qwen_vl._SpansOf, "of", lambda self, boundaries: original(self, boundaries[[0, -1]]))


SHARING = (one_dimensional, suffix_off_by_one)
MISTAKES = (*SHARING, lengths_ignored, windows_ignored)

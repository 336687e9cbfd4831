"""The forward passes of any family: the model's own over a prompt, its text decoder's over what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from storage.fields import VISION_ENCODER, VISION_ONLY, Field, by_layer
from workers.checkpoint.published import PUBLISHED
from workers.engine.attention import Spans, attending, configs_of
from workers.engine.cache import Batch, Row
from workers.engine.hooks import ending_after, inputs_of, outputs
from workers.engine.interface import Recipe
from workers.engine.models.base import Family, Inputs, Packed


@dataclass(slots=True)
class Seen:
    """What the model's own forward hands its text decoder."""

    embedded: Tensor | None = None  # (B, L, D)
    positions: Tensor | None = None  # (B, L) or (axes, B, L)


@contextmanager
def watched(family: Family) -> Iterator[Seen]:
    """See what the model hands its text decoder while the context lasts."""
    seen = Seen()

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.embedded, seen.positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")

    def enter(_module: Any, args: Any) -> None:
        if seen.embedded is None:  # of a decoder that embeds images itself
            seen.embedded = args[0]

    handles = (
        family.decoder.register_forward_pre_hook(look, with_kwargs=True),
        family.layers[0].register_forward_pre_hook(enter),
    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def vision_means(
    family: Family, vision: Mapping[int, Tensor], seen: Seen, inputs: Inputs, prompts: int = 1
) -> list[dict[str, Tensor]]:
    """Return the vision fields of each prompt, of what `vision_modules` put out; none where it had no image."""
    if 0 not in vision:
        return [{} for _ in range(prompts)]
    merged = vision.get(1, seen.embedded)
    assert merged is not None
    means = zip(family.merged_means(merged, inputs, prompts), family.encoder_means(vision[0], inputs, prompts), strict=True)
    return [{VISION_ONLY.name: merged, VISION_ENCODER.name: encoder} for merged, encoder in means]


class Passes:
    """A loaded model's forward passes, with what hooks take of them."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.device = family.model.get_input_embeddings().weight.device
        self._configs = configs_of(family.decoder)
        self._published = PUBLISHED.get(family.model.config.model_type)
        self.axes: int | None = None  # of the decoder's positions: None where it counts in one dimension
        # Of a model with recurrent layers, an empty cache's layers.
        self._layer_kinds: Sequence[Any] = DynamicCache(config=family.text).layers if family.recurrent else ()

    def run(
        self, inputs: Inputs, at: Sequence[int], fields: Sequence[Field], recipe: Recipe
    ) -> tuple[dict[str, Tensor], Batch, Tensor | None]:
        """Run the model itself over a prompt. Return the vectors of its image and of a field at each of some columns; the batch
        after it; and the last token's final states, (1, D): None where it ended after the last layer that is kept.
        """
        batch = Batch.empty([0], self.device, self._layer_kinds)
        [vectors], captured, positions, out = self._run(inputs, batch.cache, at, recipe)
        length = inputs["input_ids"].shape[1]
        batch.mask = torch.ones(1, length, dtype=torch.long, device=self.device)
        last = length - 1 if positions is None else positions.max()
        batch.next_position = batch.next_position + last + 1
        for place, field in enumerate(fields):
            vectors.update(by_layer(field, {n: v[0, place].clone() for n, v in captured.items()}))
        return vectors, batch, None if out is None else out.last_hidden_state[:, -1].to(self.device)

    def run_packed(
        self, packed: Packed, at: Sequence[int], field: Field, recipe: Recipe
    ) -> tuple[list[dict[str, Tensor]], list[Row]]:
        """Run prompts that lie in one row. Return of each the vectors of its image and of a field at its column; its cache."""
        kinds = set(self.family.kinds)
        batch = Batch.empty([0], self.device)
        masks = dict.fromkeys(kinds) if len(kinds) > 1 else None
        with attending(self._configs, Spans(packed.lengths).attend_causally):
            many = len(packed.lengths)
            vectors, captured, _, _ = self._run(packed.inputs, batch.cache, at, recipe, many, attention_mask=masks)
        layers = list(captured)
        stacked = torch.stack([captured[layer][0].to(self.device) for layer in layers], dim=1)  # (prompts, layers, D)
        for found, states in zip(vectors, stacked, strict=True):
            found.update(by_layer(field, dict(zip(layers, states.clone()))))
        return vectors, batch.rows(packed.lengths, packed.next_positions)

    def _run(
        self, inputs: Inputs, cache: Cache, at: Sequence[int], recipe: Recipe, prompts: int = 1, **more: Any
    ) -> tuple[list[dict[str, Tensor]], dict[int, Tensor], Tensor | None, Any]:
        """Run the model itself over one row. Return the vectors of each prompt's images; kept layers' states at some columns,
        (1, len(at), D); the positions that it gave, if it did; and what came out of its decoder.
        """
        family = self.family
        # A recurrent layer that was not run has no state that could be kept.
        ends = recipe.max_new_tokens == 0 and not family.recurrent
        out = None
        with (
            family.entering(inputs) as given,
            self.capture(recipe, at) as captured,
            outputs(family.vision_modules(), family.of_tower) as vision,
            watched(family) as seen,
            ending_after(family.layers[max(recipe.layers)] if ends else None),
        ):
            out = family.core(**given, **more, past_key_values=cache, use_cache=True)
        if seen.positions is not None and seen.positions.ndim == 3:
            self.axes = 3  # of four, the first is the text's own
        return self._of_images(vision, seen, inputs, recipe, prompts), captured, seen.positions, out

    def _of_images(
        self, vision: Mapping[int, Tensor], seen: Seen, inputs: Inputs, recipe: Recipe, prompts: int
    ) -> list[dict[str, Tensor]]:
        if recipe.halp_compat:  # one image
            assert seen.embedded is not None
            return [{VISION_ONLY.name: self.family.published_vision(vision[0], seen.embedded, inputs)}]
        found = vision_means(self.family, vision, seen, inputs, prompts)
        left_out = () if recipe.vision_encoder else (VISION_ENCODER.name,)
        return [{name: mean for name, mean in means.items() if name not in left_out} for means in found]

    def step(self, batch: Batch, ids: Tensor, positions: Tensor, lengths: Sequence[int], recipe: Recipe) -> Tensor | None:
        """Run the text decoder on left-padded ids (B, L); extend the batch. Return the last column's final states, (B, D).

        None where no answer is wanted and the forward ended after the last layer that is kept.
        """
        family, width = self.family, ids.shape[1]
        column = torch.tensor(lengths, device=self.device)[:, None]
        mask = (torch.arange(width, device=self.device) >= width - column).long()
        batch.mask = torch.cat([batch.mask, mask], dim=1)
        out = None
        with self.ending(recipe):
            out = family.decoder(
                input_ids=ids,
                position_ids=positions if self.axes is None else positions.expand(self.axes, *positions.shape),
                attention_mask=family.masks(batch.mask, width),
                past_key_values=batch.cache,
                use_cache=True,
                **family.step(batch.extra, width),
            )
        return None if out is None else out.last_hidden_state[:, -1].to(self.device)

    def ending(self, recipe: Recipe) -> Any:
        """End a decoder's forward after the last layer that is kept, where no answer is wanted."""
        return ending_after(self.family.layers[max(recipe.layers)] if recipe.max_new_tokens == 0 else None)

    def capture(self, recipe: Recipe, at: Sequence[int] | Tensor) -> Any:
        """Take the kept layers' outputs at some columns, (B, len(at), D). A copy: a view would keep all of (B, L, D) alive."""
        layers = {i: self.family.layers[i] for i in recipe.layers}
        columns = at if isinstance(at, Tensor) else torch.tensor(at, dtype=torch.long, device=self.device)
        definition = self._published.layers if recipe.halp_compat and self._published else "output"
        if definition == "input":
            return inputs_of(layers, lambda states: states[:, columns.to(states.device)])
        if definition == "output,last_normed" and (last := len(self.family.layers) - 1) in layers:
            layers[last] = self.family.decoder.norm
        return outputs(layers, lambda out: out[:, columns.to(out.device)])

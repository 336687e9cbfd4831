"""Image prefixes: [head | image] of a prompt, run once for all questions of an image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from storage.fields import VISION_TOKEN
from workers.engine.any_prompt import constant_prompt
from workers.engine.cache import PrefixCache, Row
from workers.engine.interface import Recipe, Request
from workers.engine.models.base import Family, Inputs
from workers.engine.passes import Passes
from workers.engine.prompt import PromptStyle


@dataclass(slots=True)
class ImagePrefix:
    """[head | image] of a prompt, run once for all questions of the image."""

    row: Row
    ids: tuple[int, ...]
    facts: dict[str, Any]
    vectors: dict[str, Tensor]  # HALP field to (D,)
    extra: Tensor | None  # what the family's further steps need, with one row

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        kept = [*self.vectors.values(), *([] if self.extra is None else [self.extra])]
        return self.row.nbytes + sum(tensor.nbytes for tensor in kept)


class Prefixes:
    """The prefixes of a loaded model: those used last are kept."""

    def __init__(self, family: Family, passes: Passes) -> None:
        self._family, self._passes = family, passes
        self.kept: PrefixCache[ImagePrefix] = PrefixCache(0)
        # On a CPU one image at a time: more leave its cache (2.5 samples/s against 3.4, benchmarks/engine.py).
        self.packed = family.together and passes.device.type == "cuda"
        self.at_once = 1  # tokens
        self._texts: dict[PromptStyle, str] = {}

    def text(self, recipe: Recipe) -> str:
        """Return a recipe's rendered constant prompt."""
        style = PromptStyle(recipe.system_prompt, recipe.chat_template)
        if style not in self._texts:
            self._texts[style] = constant_prompt(self._family.processor, style)[0]
        return self._texts[style]

    def of(self, requests: Sequence[Request], recipe: Recipe) -> tuple[dict[str, ImagePrefix], set[str]]:
        """Return the prefix of every image in the batch, and which of them had to be computed now."""
        pixels = {request.image_key: request.pixels for request in requests}
        settings = recipe.layers, recipe.max_new_tokens == 0, self.text(recipe)
        found = {key: prefix for key in pixels if (prefix := self.kept.get((key, *settings))) is not None}
        missing = sorted(pixels.keys() - found.keys(), key=lambda key: (pixels[key].size, key))
        for chunk in self._chunks(missing, pixels):
            for key, prefix in zip(chunk, self.run([pixels[key] for key in chunk], recipe), strict=True):
                found[key] = prefix
                self.kept.put((key, *settings), prefix)
        return {key: found[key] for key in pixels}, set(missing)

    def _chunks(self, keys: Sequence[str], pixels: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
        """Cut images into chunks that are run at once, within a number of tokens."""
        chunk: list[str] = []
        tokens = 0
        for key in keys:
            size = self._tokens(pixels[key]) if self.packed else self.at_once
            if chunk and tokens + size > self.at_once:
                yield chunk
                chunk, tokens = [], 0
            chunk.append(key)
            tokens += size
        if chunk:
            yield chunk

    def run(self, pixels: Sequence[np.ndarray], recipe: Recipe) -> list[ImagePrefix]:
        """Run [head | image] of some images."""
        family = self._family
        whole = family.inputs(self.text(recipe), *pixels)
        inputs = family.up_to(whole, family.cut(whole))
        return self._together(inputs, recipe) if self.packed else [self._one(inputs, recipe)]

    def _one(self, inputs: Inputs, recipe: Recipe) -> ImagePrefix:
        ids = tuple(inputs["input_ids"][0].tolist())
        facts = self.facts(ids, inputs, 0)
        vectors, batch, _ = self._passes.run(inputs, [facts["vision_token_position"]], (VISION_TOKEN,), recipe)
        [row] = batch.rows([len(ids)], batch.next_position.tolist())
        return ImagePrefix(row, ids, facts, vectors, self._family.kept_of(inputs))

    def _together(self, inputs: Inputs, recipe: Recipe) -> list[ImagePrefix]:
        packed = self._family.packed(inputs)
        row = packed.inputs["input_ids"][0].tolist()
        begins = [0, *itertools.accumulate(packed.lengths)]
        prompts = [tuple(row[begin:end]) for begin, end in itertools.pairwise(begins)]
        facts = [self.facts(ids, inputs, i) for i, ids in enumerate(prompts)]
        columns = [begin + of["vision_token_position"] for begin, of in zip(begins, facts)]
        vectors, rows = self._passes.run_packed(packed, columns, VISION_TOKEN, recipe)
        return [ImagePrefix(*parts, None) for parts in zip(rows, prompts, facts, vectors, strict=True)]

    def _tokens(self, pixels: np.ndarray) -> int:
        factor = self._family.factor
        assert factor is not None
        return int(np.prod(pixels.shape[:2])) // factor**2

    def facts(self, ids: Sequence[int], inputs: Inputs, row: int) -> dict[str, Any]:
        """Return what is known of the image in a prompt."""
        last = len(ids) - 1 - ids[::-1].index(self._family.image_id)
        facts = {"vision_token_position": last, "num_vision_tokens": ids.count(self._family.image_id)}
        grid = inputs.get("image_grid_thw")
        return facts if grid is None else facts | {"image_grid_thw": grid[row].tolist()}

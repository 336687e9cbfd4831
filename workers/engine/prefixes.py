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

VISION_POSITION = "vision_token_position"  # of the last image token, where there is one


@dataclass(slots=True)
class ImagePrefix:
    """[head | images] of a prompt, run once for all questions about the same; of those without an image, what they share."""

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

    def inputs(self, recipe: Recipe, *rows: Sequence[np.ndarray]) -> Inputs:
        """Return the inputs of what prompts about some images begin with: for a row of images each, as many in each."""
        whole = self._family.inputs(self.text(recipe, len(rows[0])), *rows)
        return self._family.up_to(whole, self._family.cut(whole)) if rows[0] else whole

    def text(self, recipe: Recipe, images: int = 1) -> str:
        """Return a recipe's rendered constant prompt; without an image, what stands before the question in it."""
        style = PromptStyle(recipe.system_prompt, recipe.chat_template, images)
        if style not in self._texts:
            self._texts[style] = constant_prompt(self._family.processor, style)
        return self._texts[style]

    def of(self, requests: Sequence[Request], recipe: Recipe) -> tuple[dict[str, ImagePrefix], set[str]]:
        """Return the prefix of every image in the batch, and which of them had to be computed now."""
        images = {request.image_key: request.images for request in requests}
        settings = recipe.layers, recipe.max_new_tokens == 0, self.text(recipe)
        found = {key: prefix for key in images if (prefix := self.kept.get((key, *settings))) is not None}
        order = {key: (len(its), sum(image.size for image in its), key) for key, its in images.items()}
        missing = sorted(images.keys() - found.keys(), key=order.__getitem__)
        for chunk in self._chunks(missing, images):
            for key, prefix in zip(chunk, self.run([images[key] for key in chunk], recipe), strict=True):
                found[key] = prefix
                self.kept.put((key, *settings), prefix)
        return {key: found[key] for key in images}, set(missing)

    def _chunks(self, keys: Sequence[str], images: Mapping[str, Sequence[np.ndarray]]) -> Iterator[list[str]]:
        """Cut questions' images into chunks that are run at once: as many images of each, within a number of tokens."""
        for _, several in itertools.groupby(keys, lambda key: len(images[key])):
            chunk: list[str] = []
            tokens = 0
            for key in several:
                size = sum(map(self._tokens, images[key])) if self.packed else self.at_once
                if chunk and tokens + size > self.at_once:
                    yield chunk
                    chunk, tokens = [], 0
                chunk.append(key)
                tokens += size
            yield chunk

    def run(self, rows: Sequence[Sequence[np.ndarray]], recipe: Recipe) -> list[ImagePrefix]:
        """Run [head | images] of some questions' images."""
        inputs = self.inputs(recipe, *rows)
        return self._together(inputs, recipe) if self.packed and rows[0] else [self._one(inputs, recipe)]

    def _one(self, inputs: Inputs, recipe: Recipe) -> ImagePrefix:
        ids = tuple(inputs["input_ids"][0].tolist())
        facts = self.facts(ids, inputs, 0)
        at = [facts[VISION_POSITION]] if VISION_POSITION in facts else []
        vectors, batch, _ = self._passes.run(inputs, at, (VISION_TOKEN,)[: len(at)], recipe)
        [row] = batch.rows([len(ids)], batch.next_position.tolist())
        return ImagePrefix(row, ids, facts, vectors, self._family.kept_of(inputs))

    def _together(self, inputs: Inputs, recipe: Recipe) -> list[ImagePrefix]:
        packed = self._family.packed(inputs)
        row = packed.inputs["input_ids"][0].tolist()
        begins = [0, *itertools.accumulate(packed.lengths)]
        prompts = [tuple(row[begin:end]) for begin, end in itertools.pairwise(begins)]
        facts = [self.facts(ids, inputs, i) for i, ids in enumerate(prompts)]
        columns = [begin + of[VISION_POSITION] for begin, of in zip(begins, facts)]
        vectors, rows = self._passes.run_packed(packed, columns, VISION_TOKEN, recipe)
        return [ImagePrefix(*parts, None) for parts in zip(rows, prompts, facts, vectors, strict=True)]

    def _tokens(self, pixels: np.ndarray) -> int:
        factor = self._family.factor
        assert factor is not None
        return int(np.prod(pixels.shape[:2])) // factor**2

    def facts(self, ids: Sequence[int], inputs: Inputs, row: int) -> dict[str, Any]:
        """Return what is known of the images in a prompt."""
        number = ids.count(self._family.image_id)
        if not number:
            return {"num_vision_tokens": 0}
        last = len(ids) - 1 - ids[::-1].index(self._family.image_id)
        facts = {VISION_POSITION: last, "num_vision_tokens": number}
        if (grid := inputs.get("image_grid_thw")) is None:
            return facts
        sizes = grid.view(len(inputs["input_ids"]), -1, 3)[row].tolist()
        return facts | {"image_grid_thw": sizes[0] if len(sizes) == 1 else sizes}

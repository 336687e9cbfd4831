"""The engine, for any family of models: their own forward over [head | image], their text decoder over the rest, hooks on it.

For each image the model's processor makes a constant prompt, cut after the image's last token: the prefix. The model itself
runs it once; a hook on its text decoder sees which positions it gave. Attention is causal (else the proof at load finds that
sharing does not hold), so everything up to there is the same for all questions of the image. Their suffixes then go through the
decoder as one batch, padded on the left, with positions and masks said explicitly, over the prefix's cache; and answers are
decoded from there. `exact` recipes, and families that share nothing, run one whole prompt at a time.

Knows nothing of runs, files or queues.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.fields import QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, by_layer
from storage.sample import Sample
from workers.checkpoint.published import PUBLISHED
from workers.checkpoint.published import Prompt as PublishedPrompt
from workers.engine.any_prompt import constant_prompt, placeholders, split_any_prompt
from workers.engine.cache import Batch, PrefixCache, Row
from workers.engine.decode import Answer, decode
from workers.engine.generation import Generation
from workers.engine.hooks import to_numpy
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.kernels import PlainAttention
from workers.engine.loading import load_checkpoint, memory_bounds, model_info
from workers.engine.models import family_of
from workers.engine.models.base import Family, Inputs
from workers.engine.passes import Passes
from workers.engine.prompt import PromptParts, PromptStyle
from workers.engine.proving.proof import Plain, most_image_tokens, plain_prompts, proof_images, refuse_difference
from workers.engine.proving.soundness import refuse_no_end
from workers.errors import EngineStartError

logger = logging.getLogger(__name__)
# One image at a time: a larger batch leaves the processor's cache (2.5 samples/s against 3.4, benchmarks/engine.py).
_CPU_PREFILL_TOKENS = 1
_GPU_PREFILL_TOKENS = 16384


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


class ModelEngine:
    """A loaded checkpoint of any family."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load and prove a checkpoint. Raises EngineStartError, UserError: why it cannot be served."""
        model, processor, config_file = load_checkpoint(spec)
        self._family = family = family_of(model.config.model_type)(model, processor)
        self._generation = Generation(model)
        refuse_no_end(self._generation.ends, processor.tokenizer)
        plain = plain_prompts(family)  # the model is as transformers makes it until the next line
        family.speed_up()
        self._passes = Passes(family)
        self._device = self._passes.device
        self._texts: dict[PromptStyle, str] = {}
        prompt = self.prompt(PromptStyle())
        recipe = Recipe(layers=(0,), max_new_tokens=1)
        [first] = self._run_images([proof_images(family)[0]], recipe)
        row = first.row
        per_token = max(1, row.growing_bytes // row.length)
        prefix_bytes, batch_tokens = memory_bounds(self._device, per_token)
        self._together = _GPU_PREFILL_TOKENS if self._device.type == "cuda" else _CPU_PREFILL_TOKENS
        self._prefixes: PrefixCache[ImagePrefix] = PrefixCache(prefix_bytes)
        self.info = model_info(
            model, processor, config_file, spec.revision, vision_hidden_size=len(first.vectors[VISION_ENCODER.name]),
            vision_encoder_definition=family.encoder_definition,
            sized=family.factor is not None, repetition_penalty=self._generation.penalty,
            placeholders=placeholders(family), prompt=prompt, factor=family.factor,
            most_image_tokens=None if family.factor else most_image_tokens(family, self._text(recipe), prompt),
            held_tokens=(row.nbytes - row.growing_bytes) // per_token, max_batch_tokens=batch_tokens,
        )  # fmt: skip
        self._prove(plain)
        self.info = replace(self.info, shares_images=family.share == "prefix", published_vision_size=self._published_size())
        self.free_cache()

    def _prove(self, plain: Sequence[Plain]) -> None:
        """Compare shared prompts with transformers' own; where they differ, compute whole ones. Raises EngineStartError."""
        family = self._family
        try:
            refuse_difference(plain, family, self.info, self.extract)
        except EngineStartError as error:
            if family.share == "nothing":
                raise
            family.share = "nothing"
            refuse_difference(plain, family, self.info, self.extract)
            logger.warning("images are not shared between questions, which is slower: %s", error)

    def _published_size(self) -> int | None:
        """Return how wide the study's vector of an image is; None: as the tower's, or of a model that it does not have."""
        if self.info.model_type not in PUBLISHED:
            return None
        recipe = Recipe(layers=(0,), max_new_tokens=0, halp_compat=True)
        inputs = self._family.inputs(self._text(recipe), proof_images(self._family)[0])
        with torch.inference_mode():
            [vectors], _, _ = self._passes.run(inputs, [0], (), recipe)
        size = len(vectors[VISION_ONLY.name])
        return None if size == self.info.vision_hidden_size else size

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style. Raises EngineStartError where the template cannot be used so."""
        return self._family.prompt(style) or split_any_prompt(self._family, style, proof_images(self._family)[0])

    def free_cache(self) -> None:
        """Free what is kept between batches."""
        self._prefixes.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _text(self, recipe: Recipe) -> str:
        """Return a recipe's rendered constant prompt."""
        style = PromptStyle(recipe.system_prompt, recipe.chat_template)
        if style not in self._texts:
            self._texts[style] = constant_prompt(self._family.processor, style)[0]
        return self._texts[style]

    @torch.inference_mode()
    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request, in their order. All requests have one recipe."""
        recipe = requests[0].recipe
        if recipe.exact or recipe.halp_compat or self._family.share == "nothing" or self._cross_the_scaling(requests):
            with PlainAttention() if recipe.math_kernel else nullcontext():
                return [self._whole(request) for request in requests]
        if not self._family.recurrent:
            return self._shared(requests)
        # A recurrent state runs through padding: suffixes of one length at a time.
        samples: dict[int, Sample] = {}
        for length in sorted({len(request.suffix_ids) for request in requests}):
            chosen = [i for i, request in enumerate(requests) if len(request.suffix_ids) == length]
            samples |= zip(chosen, self._shared([requests[i] for i in chosen]))
        return [samples[i] for i in range(len(requests))]

    def _shared(self, requests: Sequence[Request]) -> list[Sample]:
        recipe, family = requests[0].recipe, self._family
        prefixes, computed = self._prefixes_of(requests, recipe)
        order = list(prefixes)
        index = [order.index(request.image_key) for request in requests]
        batch = Batch.of([prefixes[key].row for key in order], index, self._device)
        batch.extra = _stacked([prefixes[order[i]].extra for i in index])
        lengths = torch.tensor([len(request.suffix_ids) for request in requests], device=self._device)
        width = int(lengths.max())
        rows = [torch.tensor(request.suffix_ids, device=self._device) for request in requests]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")  # (B, L)
        offsets = torch.arange(width, device=self._device) - (width - lengths)[:, None]  # negative on padding
        positions = batch.next_position[:, None] + offsets.clamp(min=0)
        with self._passes.capture(recipe, [-1]) as captured:
            states = self._passes.step(batch, ids, positions, lengths.tolist(), recipe)
        batch.next_position = batch.next_position + lengths
        prompts = [(*prefixes[request.image_key].ids, *request.suffix_ids) for request in requests]
        answers = self._answer(batch, states, prompts, recipe)
        samples = []
        for i, request in enumerate(requests):
            prefix = prefixes[request.image_key]
            vectors = prefix.vectors | by_layer(QUERY_TOKEN, {n: v[i, 0] for n, v in captured.items()})
            facts = {
                **prefix.facts,
                "seq_len": len(prompts[i]),
                "query_token_position": len(prompts[i]) - 1,
                "batch_size": len(requests),
                "image_prefix": "computed" if request.image_key in computed else "shared",
            }
            computed.discard(request.image_key)
            samples.append(self._sample(family, vectors, answers[i], facts))
        return samples

    def _prefixes_of(self, requests: Sequence[Request], recipe: Recipe) -> tuple[dict[str, ImagePrefix], set[str]]:
        """Return the prefix of every image in the batch, and which of them had to be computed now."""
        pixels = {request.image_key: request.pixels for request in requests}
        settings = recipe.layers, recipe.max_new_tokens == 0, self._text(recipe)
        found = {key: prefix for key in pixels if (prefix := self._prefixes.get((key, *settings))) is not None}
        missing = sorted(pixels.keys() - found.keys(), key=lambda key: (pixels[key].size, key))
        for chunk in self._chunks(missing, pixels):
            for key, prefix in zip(chunk, self._run_images([pixels[key] for key in chunk], recipe), strict=True):
                found[key] = prefix
                self._prefixes.put((key, *settings), prefix)
        return {key: found[key] for key in pixels}, set(missing)

    def _chunks(self, keys: Sequence[str], pixels: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
        """Cut images, sorted by size, into chunks that are run at once: within a number of tokens, padding counted."""
        chunk: list[str] = []
        for key in keys:
            tokens = self.info.image_tokens(*pixels[key].shape[:2])
            if chunk and (not self._family.together or (len(chunk) + 1) * tokens > self._together):
                yield chunk
                chunk = []
            chunk.append(key)
        if chunk:
            yield chunk

    def _run_images(self, pixels: Sequence[np.ndarray], recipe: Recipe) -> list[ImagePrefix]:
        """Run [head | image] of some images."""
        family = self._family
        whole = family.inputs(self._text(recipe), *pixels)
        inputs = family.up_to(whole, family.cut(whole))
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        last = int((ids[0] == family.image_id).nonzero()[-1]) - ids.shape[1]  # from the end: closing tokens are as many in all
        vectors, batch, _ = self._passes.run(inputs, [last], (VISION_TOKEN,), recipe)
        made = []
        for i, (row, found) in enumerate(zip(batch.rows(), vectors, strict=True)):
            own = ids[i][real[i].bool()]
            facts = self._facts(own, inputs, i)
            made.append(ImagePrefix(row, tuple(own.tolist()), facts, found, family.kept_of(inputs)))
        return made

    def _whole(self, request: Request) -> Sample:
        """Run a whole prompt, which shares nothing."""
        family, recipe = self._family, request.recipe
        made = family.inputs(self._text(recipe), request.pixels)
        inputs = family.extended(family.up_to(made, family.cut(made)), request.suffix_ids)
        ids = inputs["input_ids"][0]
        end, facts = len(ids) - 1, self._facts(ids, inputs, 0)
        if recipe.halp_compat:
            first, grid = int((ids == family.image_id).nonzero()[0]), facts.get("image_grid_thw")
            patches = facts["num_vision_tokens"] if grid is None else math.prod(grid)
            where = PublishedPrompt(len(ids), first, facts["vision_token_position"], patches)
            facts["vision_token_position"], end = PUBLISHED[self.info.model_type].place(where)
        [vectors], batch, final = self._passes.run(
            inputs, [facts["vision_token_position"], end], (VISION_TOKEN, QUERY_TOKEN), recipe
        )
        batch.extra = family.kept_of(inputs)
        prompt = tuple(ids.tolist())
        [answer] = self._answer(batch, final, [prompt], recipe)
        facts = {
            **facts,
            "seq_len": len(prompt),
            "query_token_position": end,
            "batch_size": 1,
            "image_prefix": "computed" if recipe.exact or recipe.halp_compat else "whole",
        }
        return self._sample(family, vectors, answer, facts)

    def _answer(self, batch: Batch, last: Tensor | None, prompts: Sequence[tuple[int, ...]], recipe: Recipe) -> list[Answer]:
        if last is None or recipe.max_new_tokens == 0:
            return [Answer() for _ in prompts]

        def forward(batch: Batch, tokens: Tensor) -> Tensor:
            states = self._passes.step(batch, tokens[:, None], batch.next_position[:, None], [1] * len(tokens), recipe)
            batch.next_position = batch.next_position + 1
            assert states is not None
            return states

        vocabulary = self._family.model.get_output_embeddings().out_features
        rules = self._generation.rules(prompts, vocabulary, recipe.repetition_penalty, recipe.max_new_tokens, self._device)
        ends, longest = self._generation.ends, recipe.max_new_tokens
        return decode(batch, last, rules=rules, head=self._family.scores, forward=forward, eos=ends, max_new_tokens=longest)

    def _cross_the_scaling(self, requests: Sequence[Request]) -> bool:
        """Tell whether positions of some prompt depend on its length, and those of its prefix would be others."""
        limit = self._family.scaled_from
        return limit is not None and any(r.num_tokens + r.recipe.max_new_tokens > limit for r in requests)

    def _facts(self, ids: Tensor, inputs: Inputs, row: int) -> dict[str, Any]:
        images = (ids == self._family.image_id).nonzero()
        facts = {"vision_token_position": int(images[-1]), "num_vision_tokens": len(images)}
        grid = inputs.get("image_grid_thw")
        return facts if grid is None else facts | {"image_grid_thw": grid[row].tolist()}

    def _sample(self, family: Family, vectors: dict[str, Tensor], answer: Answer, facts: dict[str, Any]) -> Sample:
        text = family.processor.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        return Sample({name: to_numpy(vector) for name, vector in vectors.items()}, text, facts | answer.facts)


def _stacked(extras: Sequence[Tensor | None]) -> Tensor | None:
    found = [extra for extra in extras if extra is not None]
    return torch.cat(found) if found else None

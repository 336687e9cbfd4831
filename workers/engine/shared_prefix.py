"""The Qwen2.5-VL engine: hidden states and greedy answers for a batch of questions, each image computed once.

The question comes after the image and attention is causal, so everything up to the last image token is the same for all
questions of an image. A batch runs in four steps: the vision tower per image, the prefix [head | image] per image, the
suffixes [question | tail] over the prefixes' KV cache expanded to the questions, and greedy decoding from the same cache.
Everything is padded on the left, so that the last image token and the last prompt token are at index -1, where hooks on the
decoder layers take the vectors. `exact` and `halp_compat` recipes run one whole prompt at a time and share nothing.

Knows nothing of runs, files or queues.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.fields import QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, by_layer
from storage.sample import Sample
from storage.settings import LAST_BLOCK
from workers.engine.cache import Batch, Prefix, PrefixCache
from workers.engine.decode import Answer, decode
from workers.engine.generation import Generation
from workers.engine.hooks import ending_after, outputs, to_numpy
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.kernels import PlainAttention
from workers.engine.loading import kv_bytes_per_token, load_checkpoint, memory_bounds, model_info
from workers.engine.models.qwen2_5_vl import Image, VisionTower, prefix_positions
from workers.engine.prompt import PLACEHOLDERS, PromptParts, PromptStyle, split_prompt
from workers.engine.proving.proof import plain_prompts, refuse_difference
from workers.engine.proving.soundness import refuse_no_end

# One image at a time: a larger batch leaves the processor's cache (2.5 samples/s against 3.4, benchmarks/engine.py).
_CPU_PREFILL_TOKENS = 1
_GPU_PREFILL_TOKENS = 16384


class QwenEngine:
    """A loaded Qwen2.5-VL checkpoint of any size."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load and prove a checkpoint. Raises EngineStartError, UserError: why it cannot be served."""
        self._model, processor, config_file = load_checkpoint(spec)
        self._device = self._model.get_input_embeddings().weight.device
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._decoder = self._model.model.language_model
        self._generation = Generation(self._model)
        refuse_no_end(self._generation.ends, self._tokenizer)
        self._image_token = self._model.config.image_token_id
        self._merge_size: int = self._model.config.vision_config.spatial_merge_size
        prompt = split_prompt(processor)
        plain = plain_prompts(self._model, processor)  # the tower is as transformers makes it until the next line
        self._vision = VisionTower(
            self._model.model.visual, processor.image_processor, self._model.dtype, self._model.model.visual.device
        )
        self._prefill_tokens = _GPU_PREFILL_TOKENS if self._device.type == "cuda" else _CPU_PREFILL_TOKENS
        per_token = kv_bytes_per_token(self._model.config.get_text_config(), self._model.dtype)
        prefix_bytes, batch_tokens = memory_bounds(self._device, per_token)
        self._prefixes: PrefixCache[Prefix] = PrefixCache(prefix_bytes)
        vision = self._model.config.vision_config
        self.info = model_info(
            self._model, processor, config_file, spec.revision, vision_hidden_size=vision.hidden_size,
            vision_encoder_definition=LAST_BLOCK, sized=True,
            repetition_penalty=self._generation.penalty, placeholders=PLACEHOLDERS, prompt=prompt,
            factor=vision.patch_size * vision.spatial_merge_size, most_image_tokens=None, held_tokens=0,
            max_batch_tokens=batch_tokens,
        )  # fmt: skip
        refuse_difference(plain, self.info, self._image_token, self.extract)
        self.free_cache()

    @torch.inference_mode()
    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request, in their order. All requests have one recipe."""
        recipe = requests[0].recipe
        if recipe.exact or recipe.halp_compat:
            with PlainAttention() if recipe.math_kernel else nullcontext():
                return [self._extract_whole(request) for request in requests]
        return self._extract_shared(requests, recipe)

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style. Raises EngineStartError where the template cannot be used so."""
        return split_prompt(self._processor, style)

    def free_cache(self) -> None:
        """Free what is kept between batches."""
        self._prefixes.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # Shared image prefix

    def _extract_shared(self, requests: Sequence[Request], recipe: Recipe) -> list[Sample]:
        prefixes, computed = self._prefixes_of(requests, recipe)
        order = list(prefixes)
        index = [order.index(request.image_key) for request in requests]
        batch = Batch.of([prefixes[key].row for key in order], index, self._device)
        suffixes = [request.suffix_ids for request in requests]
        with self._capture_states(recipe) as captured:
            last = self._prefill_suffixes(batch, suffixes, recipe)
        prompts = [self._prompt_ids(prefixes[r.image_key].num_tokens, r) for r in requests]
        answers = self._answer(batch, last, prompts, recipe)
        samples = []
        for i, request in enumerate(requests):
            prefix = prefixes[request.image_key]
            vectors = prefix.vectors | by_layer(QUERY_TOKEN, {n: v[i] for n, v in captured.items()})
            facts = {
                **self._positions(prefix.num_tokens, prefix.grid, prompts[i], request),
                "batch_size": len(requests),
                # How well images are shared: the share of questions that did not have to compute their image's prefix.
                "image_prefix": "computed" if request.image_key in computed else "shared",
            }
            computed.discard(request.image_key)
            samples.append(self._sample(vectors, answers[i], facts))
        return samples

    def _prefixes_of(self, requests: Sequence[Request], recipe: Recipe) -> tuple[dict[str, Prefix], set[str]]:
        """Return the prefix of every image in the batch, and which of them had to be computed now."""
        pixels = {request.image_key: request.pixels for request in requests}
        found: dict[str, Prefix] = {}
        for key in pixels:
            if (prefix := self._prefixes.get(self._prefix_key(key, recipe))) is not None:
                found[key] = prefix
        missing = sorted(pixels.keys() - found.keys(), key=lambda key: pixels[key].size)
        for chunk in self._chunks(missing, pixels):
            for key, prefix in zip(chunk, self._prefill_images([pixels[key] for key in chunk], recipe)):
                found[key] = prefix
                self._prefixes.put(self._prefix_key(key, recipe), prefix)
        return found, set(missing)

    def _chunks(self, keys: Sequence[str], pixels: dict[str, np.ndarray]) -> Iterator[list[str]]:
        """Cut keys, sorted by size, into chunks within the token budget of a prefill."""
        chunk: list[str] = []
        for key in keys:
            tokens = self.info.image_tokens(*pixels[key].shape[:2])
            if chunk and (len(chunk) + 1) * tokens > self._prefill_tokens:
                yield chunk
                chunk = []
            chunk.append(key)
        if chunk:
            yield chunk

    def _prefix_key(self, image_key: str, recipe: Recipe) -> Hashable:
        return image_key, recipe.layers, recipe.max_new_tokens == 0, recipe.head_ids

    def _prefill_images(self, pixels: Sequence[np.ndarray], recipe: Recipe) -> list[Prefix]:
        """Run the vision tower and [head | image] of some images."""
        images = self._vision(pixels)
        head = self._embed(self._head(recipe))  # (H, D)
        rows = [torch.cat([head, image.tokens.to(self._device)]) for image in images]
        positions = [prefix_positions(len(head), image.grid, self._merge_size).to(self._device) for image in images]
        batch = Batch.empty([int(p.max()) + 1 for p in positions], self._device)
        with self._capture_states(recipe) as captured:
            padded = _pad_left([p.T for p in positions]).permute(2, 0, 1)  # (3, B, L)
            self._forward(batch, _pad_left(rows), padded, [len(r) for r in rows], recipe)
        return [
            Prefix(
                row,
                image.grid,
                len(image.tokens),
                self._vision_fields(image, recipe) | by_layer(VISION_TOKEN, {n: v[i].clone() for n, v in captured.items()}),
            )
            for i, (row, image) in enumerate(zip(batch.rows(), images))
        ]

    def _prefill_suffixes(self, batch: Batch, suffixes: Sequence[tuple[int, ...]], recipe: Recipe) -> Tensor | None:
        """Run the suffixes over the expanded cache. Return the last prompt token's final states, (B, D)."""
        rows = [self._embed(ids) for ids in suffixes]
        lengths = torch.tensor([len(ids) for ids in suffixes], device=self._device)
        width = int(lengths.max())
        offsets = torch.arange(width, device=self._device) - (width - lengths)[:, None]  # (B, L), negative on padding
        positions = (batch.next_position[:, None] + offsets.clamp(min=0)).expand(3, -1, -1)
        states = self._forward(batch, _pad_left(rows), positions, lengths.tolist(), recipe)
        batch.next_position = batch.next_position + lengths
        return None if states is None else states[:, -1]

    # One whole prompt at a time: `exact` and `halp_compat`

    def _extract_whole(self, request: Request) -> Sample:
        recipe = request.recipe
        [image] = self._vision([request.pixels])
        prompt = self._prompt_ids(len(image.tokens), request)
        head, suffix = self._embed(self._head(recipe)), self._embed(request.suffix_ids)
        embedded = torch.cat([head, image.tokens.to(self._device), suffix])[None]  # (1, L, D)
        prefix = prefix_positions(len(head), image.grid, self._merge_size).to(self._device)
        after = int(prefix.max()) + 1 + torch.arange(len(suffix), device=self._device)
        positions = torch.cat([prefix, after.expand(3, -1)], dim=1)[:, None]  # (3, 1, L)
        facts = self._positions(len(image.tokens), image.grid, prompt, request)
        if recipe.halp_compat:
            # The published scripts' position: patches before merging, capped at the middle of the prompt.
            facts["vision_token_position"] = min(image.grid[0] * image.grid[1] * image.grid[2], len(prompt) // 2)
        at = [facts["vision_token_position"], facts["query_token_position"]]
        batch = Batch.empty([int(after[-1]) + 1], self._device)
        with self._capture_states(recipe, at) as captured:
            states = self._forward(batch, embedded, positions, [len(prompt)], recipe)
        last = None if states is None else states[:, -1]
        [answer] = self._answer(batch, last, [prompt], recipe)
        vectors = (
            self._vision_fields(image, recipe)
            | by_layer(VISION_TOKEN, {n: v[0] for n, v in captured.items()})
            | by_layer(QUERY_TOKEN, {n: v[1] for n, v in captured.items()})
        )
        return self._sample(vectors, answer, {**facts, "batch_size": 1, "image_prefix": "computed"})

    # Common to both

    def _forward(
        self, batch: Batch, embedded: Tensor, positions: Tensor, lengths: Sequence[int], recipe: Recipe
    ) -> Tensor | None:
        """Run the decoder on left-padded rows (B, L, D) with positions (3, B, L); extend the batch's cache and mask.

        Return the final states (B, L, D), or None where no answer is wanted and the forward ended after the last layer
        that is kept.
        """
        width = embedded.shape[1]
        column = torch.tensor(lengths, device=self._device)[:, None]
        mask = (torch.arange(width, device=self._device) >= width - column).long()
        batch.mask = torch.cat([batch.mask, mask], dim=1)
        out = None
        with ending_after(self._decoder.layers[max(recipe.layers)] if recipe.max_new_tokens == 0 else None):
            out = self._decoder(
                inputs_embeds=embedded,
                position_ids=positions,
                attention_mask=batch.mask,
                past_key_values=batch.cache,
                use_cache=True,
            )
        # Of a model on several GPUs, the final norm is on another than the embeddings, where everything of ours is.
        return None if out is None else out.last_hidden_state.to(self._device)

    def _answer(self, batch: Batch, last: Tensor | None, prompts: Sequence[tuple[int, ...]], recipe: Recipe) -> list[Answer]:
        if last is None:
            return [Answer() for _ in prompts]

        def forward(batch: Batch, tokens: Tensor) -> Tensor:
            embedded = self._model.get_input_embeddings()(tokens)[:, None]
            positions = batch.next_position[None, :, None].expand(3, -1, -1)
            states = self._forward(batch, embedded, positions, [1] * len(tokens), recipe)
            batch.next_position = batch.next_position + 1
            assert states is not None
            return states[:, -1]

        head = self._model.lm_head
        rules = self._generation.rules(
            prompts, head.out_features, recipe.repetition_penalty, recipe.max_new_tokens, self._device
        )
        ends, longest = self._generation.ends, recipe.max_new_tokens
        return decode(batch, last, rules=rules, head=head, forward=forward, eos=ends, max_new_tokens=longest)

    def _sample(self, vectors: dict[str, Tensor], answer: Answer, facts: dict[str, Any]) -> Sample:
        text = self._tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        return Sample({name: to_numpy(vector) for name, vector in vectors.items()}, text, facts | answer.facts)

    def _vision_fields(self, image: Image, recipe: Recipe) -> dict[str, Tensor]:
        if recipe.halp_compat:
            return {VISION_ONLY.name: image.encoder_mean}
        merged = {VISION_ONLY.name: image.merged_mean}
        return merged | ({VISION_ENCODER.name: image.encoder_mean} if recipe.vision_encoder else {})

    def _head(self, recipe: Recipe) -> tuple[int, ...]:
        return self.info.prompt.head_ids if recipe.head_ids is None else recipe.head_ids

    def _positions(
        self, num_tokens: int, grid: tuple[int, int, int], prompt: Sequence[int], request: Request
    ) -> dict[str, Any]:
        return {
            "seq_len": len(prompt),
            "vision_token_position": len(self._head(request.recipe)) + num_tokens - 1,
            "query_token_position": len(prompt) - 1,
            "image_grid_thw": list(grid),
            "num_vision_tokens": num_tokens,
        }

    def _prompt_ids(self, image_tokens: int, request: Request) -> tuple[int, ...]:
        return (*self._head(request.recipe), *([self._image_token] * image_tokens), *request.suffix_ids)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self._model.get_input_embeddings()(torch.tensor(ids, device=self._device))
        return embedded

    def _capture_states(self, recipe: Recipe, at: Sequence[int] | None = None) -> Any:
        """Take the kept layers' outputs: the last position of each row, (B, D), or some positions of the only row.

        A copy: a view would keep all of (B, L, D) alive.
        """
        layers = {i: self._decoder.layers[i] for i in recipe.layers}
        return outputs(layers, lambda out: (out[:, -1] if at is None else out[0, list(at)]).clone())


def _pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows (L_i, *) to (B, max L, *) with zeros on the left."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")

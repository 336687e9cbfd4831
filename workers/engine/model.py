"""The engine, for any family of models: their own forward over [head | image], their text decoder over the rest, hooks on it.

For each image the model's processor makes a constant prompt, cut after the image's last token: the prefix. The model itself
runs it once; a hook on its text decoder sees which positions it gave. Attention is causal (else the proof at load finds that
sharing does not hold), so everything up to there is the same for all questions of the image. Their suffixes then go through the
decoder as one batch, padded on the left, with positions and masks said explicitly, over the prefix's cache; and answers are
decoded from there. `exact` recipes, and families that share nothing, run one whole prompt at a time.

Knows nothing of runs, files or queues.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from storage.fields import EVERY, QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, by_layer
from storage.sample import Sample
from workers.checkpoint.families import refuse_without_image
from workers.checkpoint.published import PUBLISHED
from workers.checkpoint.published import Prompt as PublishedPrompt
from workers.engine.any_prompt import placeholders, split_any_prompt
from workers.engine.cache import Batch
from workers.engine.decoding.answer_states import AnswerStates
from workers.engine.decoding.decode import Answer, decode
from workers.engine.decoding.generation import Generation
from workers.engine.decoding.slots import Slots
from workers.engine.hooks import outputs, to_host
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.kernels import PlainAttention
from workers.engine.loading import MemoryBounds, free_memory, load_checkpoint, model_info
from workers.engine.models import family_of
from workers.engine.passes import Passes
from workers.engine.prefixes import VISION_POSITION, ImagePrefix, Prefixes
from workers.engine.prompt import PromptParts, PromptStyle
from workers.engine.proving.proof import (
    Plain,
    asked_again,
    is_invariant,
    most_image_tokens,
    plain_prompts,
    proof_images,
    refuse_difference,
    refusing,
)
from workers.engine.proving.soundness import refuse_no_end
from workers.errors import EngineStartError, in_a_line

logger = logging.getLogger(__name__)
_FAULTS = (EngineStartError, RuntimeError, TypeError, ValueError, LookupError, AttributeError)
_MOST_SLOTS = 128
_REFILL_SHARE = 0.125  # of the slots: a prefill of one question costs nearly what one of several does


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
        self._prefixes = Prefixes(family, self._passes)
        self._device = self._passes.device
        prompt = self.prompt(PromptStyle())
        recipe = Recipe(layers=(0,), max_new_tokens=1)
        first = self._first_prefix(recipe)
        row = first.row
        per_token = self._token_bytes = max(1, row.growing_bytes // row.length)
        bounds = MemoryBounds.within(free_memory(self._device), self._device.type, per_token, family.active_bytes)
        self._prefixes.kept.max_bytes, self._prefixes.at_once = bounds.prefix_bytes, bounds.prefill_tokens
        self.info = model_info(
            model, processor, config_file, spec.revision, vision_hidden_size=len(first.vectors[VISION_ENCODER.name]),
            vision_encoder_definition=family.encoder_definition,
            sized=family.factor is not None, repetition_penalty=self._generation.penalty,
            placeholders=placeholders(family), prompt=prompt, factor=family.factor,
            most_image_tokens=None if family.factor else most_image_tokens(family, self._prefixes.text(recipe), prompt),
            held_tokens=(row.nbytes - row.growing_bytes) // per_token, max_batch_tokens=bounds.batch_tokens,
        )  # fmt: skip
        alone = first.extra is not None or row.growing_bytes < row.nbytes  # more than text is attended to
        self._most_of_several: int | None = None
        self._slots = None if alone else Slots(family, self._generation.ends, self._passes.axes)
        self._prove(plain)
        invariance = "bitwise" if self._is_invariant(plain) else "none"
        environment = self.info.environment | {"batch_invariance": invariance}
        self.info = replace(
            self.info,
            environment=environment,
            shares_images=family.share == "prefix",
            published_vision_size=self._published_size(),
        )
        self.free_cache()

    def _first_prefix(self, recipe: Recipe) -> ImagePrefix:
        """Run an image, packed or else plainly; what shapes the caches have follows from it."""
        images = proof_images(self._family)[:1]
        try:
            return self._prefixes.run([images], recipe)[0]
        except torch.OutOfMemoryError:
            raise
        except _FAULTS as error:
            if not self._prefixes.packed:
                raise
            logger.warning("images are run one at a time, which is slower: %s", in_a_line(error))
            self._prefixes.packed = False
            return self._prefixes.run([images], recipe)[0]

    def _prove(self, plain: Sequence[Plain]) -> None:
        """Compare with transformers' own; where it differs or fails, go a plainer way. Raises EngineStartError.

        A fault may be of an architecture whose attention is its own, or of a torch with another flash attention.
        """
        slots, packed, faults = self._slots, self._prefixes.packed, []
        for self._slots, self._prefixes.packed in dict.fromkeys(
            [(slots, packed), (None, packed), (slots, False), (None, False)]
        ):
            self._prefixes.kept.clear()
            try:
                refuse_difference(plain, self._family, self.info, self.extract)
            except torch.OutOfMemoryError:
                raise
            except _FAULTS as error:
                faults.append(error)
                continue
            if slots is not None and self._slots is None:
                logger.warning("questions are padded, which is slower: %s", in_a_line(faults[0]))
            if packed and not self._prefixes.packed:
                logger.warning("images are run one at a time, which is slower: %s", in_a_line(faults[0]))
            return
        if self._family.share == "nothing" or not isinstance(faults[-1], EngineStartError):
            raise faults[-1]
        self._family.share = "nothing"
        refuse_difference(plain, self._family, self.info, self.extract)
        logger.warning("images are not shared between questions, which is slower: %s", in_a_line(faults[-1]))

    def _is_invariant(self, plain: Sequence[Plain]) -> bool:
        """Measure whether a question's results depend on the others in its batch."""

        def extract(requests: Sequence[Request]) -> list[Sample]:
            self._prefixes.kept.clear()
            return self.extract(requests)

        return is_invariant(asked_again(plain, self._family, self.info, (0, self.info.num_hidden_layers - 1), 4), extract)

    def _published_size(self) -> int | None:
        """Return how wide the study's vector of an image is; None: as the tower's, or of a model that it does not have."""
        if self.info.model_type not in PUBLISHED:
            return None
        recipe = Recipe(layers=(0,), max_new_tokens=0, halp_compat=True)
        inputs = self._family.inputs(self._prefixes.text(recipe), proof_images(self._family)[:1])
        with torch.inference_mode():
            vectors, _, _ = self._passes.run(inputs, [0], (), recipe)
        size = len(vectors[VISION_ONLY.name])
        return None if size == self.info.vision_hidden_size else size

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style. Raises EngineStartError where the template cannot be used so.

        With another number of images than one, what the engine computes is first compared with the model's plain forward, whose
        tower the proof at load has compared with transformers' own.
        """
        family = self._family
        if style.images == 1:
            return family.prompt(style) or split_any_prompt(family, style, proof_images(family)[:1])
        if style.images == 0:
            refuse_without_image(self.info.model_type)
        with refusing():
            parts = split_any_prompt(family, style, proof_images(family, style.images))
            refuse_difference(plain_prompts(family, style), family, self.info, self.extract, parts, style)
        return parts if family.factor or not style.images else replace(parts, image_tokens=self._tokens_of_several())

    def _tokens_of_several(self) -> int:
        """Return the most tokens that one of several images becomes: some processors cut those into fewer tiles."""
        if self._most_of_several is None:
            style = PromptStyle(images=2)
            parts = split_any_prompt(self._family, style, proof_images(self._family))
            text = self._prefixes.text(Recipe(layers=(0,)), 2)
            self._most_of_several = most_image_tokens(self._family, text, parts, 2)
        return self._most_of_several

    def free_cache(self) -> None:
        """Free what is kept between batches."""
        self._prefixes.kept.clear()
        if self._slots is not None:
            self._slots.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request, in their order. All requests have one recipe."""
        recipe = requests[0].recipe
        if recipe.exact or recipe.halp_compat or self._family.share == "nothing" or self._cross_the_scaling(requests):
            with PlainAttention() if recipe.math_kernel else nullcontext():
                return [self._whole(request) for request in requests]
        if self._slots is not None and self._generation.plain:
            return self._in_slots(requests)
        # What is kept of several images has another shape. A recurrent state runs through padding: suffixes of one length.
        recurrent = self._family.recurrent
        kinds = [(len(request.images), len(request.suffix_ids) if recurrent else 0) for request in requests]
        samples: dict[int, Sample] = {}
        weight = self._states_weight(recipe) + recipe.max_new_tokens + max(request.weight for request in requests)
        most = max(1, self.info.max_batch_tokens // weight) if EVERY in recipe.answer_states else len(requests)
        for kind in sorted(set(kinds)):
            chosen = [i for i, its in enumerate(kinds) if its == kind]
            for some in (chosen[start : start + most] for start in range(0, len(chosen), most)):
                samples |= zip(some, self._shared([requests[i] for i in some]))
        return [samples[i] for i in range(len(requests))]

    def _in_slots(self, requests: Sequence[Request]) -> list[Sample]:
        """Compute questions in slots, as many at once as memory has room for."""
        slots, recipe = self._slots, requests[0].recipe
        assert slots is not None
        longest = max(request.num_tokens for request in requests) + recipe.max_new_tokens
        number = max(1, min(len(requests), _MOST_SLOTS, self.info.max_batch_tokens // (longest + self._states_weight(recipe))))
        if EVERY in recipe.answer_states and number < len(requests):  # each holds what it is answered with, to the end
            return [*self._in_slots(requests[:number]), *self._in_slots(requests[number:])]
        penalty = self._generation.penalty if recipe.repetition_penalty is None else recipe.repetition_penalty
        if EVERY in recipe.answer_states:
            slots.shrink(number, recipe.max_new_tokens)
        waiting = list(range(len(requests)))
        made: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        answers: dict[int, Answer] = {}
        computed: set[str] = set()
        reserved = False
        while len(answers) < len(requests):
            free = len(slots.free) if reserved else number
            if waiting and (not slots.busy or free >= max(1, _REFILL_SHARE * number)):
                sizes = itertools.accumulate(len(requests[i].suffix_ids) for i in waiting[:free])
                number_now = max(1, sum(size <= self._prefixes.at_once for size in sizes))
                chosen, waiting = waiting[:number_now], waiting[number_now:]
                asked = [requests[i] for i in chosen]
                prefixes, new = self._prefixes.of(asked, recipe)
                computed |= new
                order = list(prefixes)
                rows = [prefixes[key].row for key in order]
                if not reserved:
                    slots.reserve(rows[0], number, longest, recipe.max_new_tokens)
                    slots.begin(penalty, recipe.answer_states, recipe.layers)
                    reserved = True
                prompts = [(*prefixes[request.image_key].ids, *request.suffix_ids) for request in asked]
                of = [order.index(request.image_key) for request in asked]
                suffixes, limits = [request.suffix_ids for request in asked], [recipe.max_new_tokens] * len(asked)
                prefill = slots.take(chosen, rows, of, prompts, suffixes, limits)
                with (
                    self._passes.capture(recipe, prefill.last) as captured,
                    self._passes.ending(recipe),
                ):
                    slots.run(prefill)
                for place, (i, request) in enumerate(zip(chosen, asked)):
                    prefix = prefixes[request.image_key]
                    vectors = prefix.vectors | by_layer(QUERY_TOKEN, {n: v[0, place] for n, v in captured.items()})
                    made[i] = vectors, self._shared_facts(prefix, prompts[place], request, len(requests), computed)
            if recipe.max_new_tokens:
                answers |= slots.decode()
            else:
                answers |= {i: Answer() for i in slots.leave()}
        return self._samples([(*made[i], answers[i]) for i in range(len(requests))])

    def _states_weight(self, recipe: Recipe) -> int:
        """Return what states of all of an answer's tokens take, while they are gathered and when they are copied, in tokens."""
        if EVERY not in recipe.answer_states:
            return 0
        states = recipe.max_new_tokens * len(recipe.layers) * self.info.hidden_size * self._family.model.dtype.itemsize
        return int(3 * states // self._token_bytes)

    def _shared_facts(
        self, prefix: ImagePrefix, prompt: Sequence[int], request: Request, number: int, computed: set[str]
    ) -> dict[str, Any]:
        """Return what is known of a question; the first one of an image takes it from those that had to be computed."""
        facts = {
            **prefix.facts,
            "seq_len": len(prompt),
            "query_token_position": len(prompt) - 1,
            "batch_size": number,
            # How well images are shared: the share of questions that did not have to compute their image's prefix.
            "image_prefix": "computed" if request.image_key in computed else "shared",
        }
        computed.discard(request.image_key)
        return facts

    def _shared(self, requests: Sequence[Request]) -> list[Sample]:
        recipe = requests[0].recipe
        prefixes, computed = self._prefixes.of(requests, recipe)
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
        made = []
        for i, request in enumerate(requests):
            prefix = prefixes[request.image_key]
            vectors = prefix.vectors | by_layer(QUERY_TOKEN, {n: v[i, 0] for n, v in captured.items()})
            facts = self._shared_facts(prefix, prompts[i], request, len(requests), computed)
            made.append((vectors, facts, answers[i]))
        return self._samples(made)

    def _whole(self, request: Request) -> Sample:
        """Run a whole prompt, which shares nothing."""
        family, recipe = self._family, request.recipe
        inputs = family.extended(self._prefixes.inputs(recipe, request.images), request.suffix_ids)
        prompt = tuple(inputs["input_ids"][0].tolist())
        end, facts = len(prompt) - 1, self._prefixes.facts(prompt, inputs, 0)
        if recipe.halp_compat:
            grid = facts.get("image_grid_thw")
            patches = facts["num_vision_tokens"] if grid is None else math.prod(grid)
            where = PublishedPrompt(len(prompt), prompt.index(family.image_id), facts[VISION_POSITION], patches)
            facts[VISION_POSITION], end = PUBLISHED[self.info.model_type].place(where)
        at, fields = [end], [QUERY_TOKEN]
        if VISION_POSITION in facts:
            at, fields = [facts[VISION_POSITION], end], [VISION_TOKEN, QUERY_TOKEN]
        vectors, batch, final = self._passes.run(inputs, at, fields, recipe)
        batch.extra = family.kept_of(inputs)
        [answer] = self._answer(batch, final, [prompt], recipe)
        facts = {
            **facts,
            "seq_len": len(prompt),
            "query_token_position": end,
            "batch_size": 1,
            "image_prefix": "computed" if recipe.exact or recipe.halp_compat else "whole",
        }
        return self._samples([(vectors, facts, answer)])[0]

    def _answer(self, batch: Batch, last: Tensor | None, prompts: Sequence[tuple[int, ...]], recipe: Recipe) -> list[Answer]:
        if last is None or recipe.max_new_tokens == 0:
            return [Answer() for _ in prompts]

        modules = {layer: self._family.layers[layer] for layer in (recipe.layers if recipe.answer_states else ())}

        def forward(batch: Batch, tokens: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            with outputs(modules, lambda out: out[:, -1]) as states:  # (B, 1, D) to (B, D)
                last = self._passes.step(batch, tokens[:, None], batch.next_position[:, None], [1] * len(tokens), recipe)
            batch.next_position = batch.next_position + 1
            assert last is not None
            return last, [states[layer] for layer in modules]

        keep = None
        if recipe.answer_states:
            shape = len(prompts), recipe.max_new_tokens, self._family.text.hidden_size, self._family.model.dtype
            keep = AnswerStates(recipe.answer_states, recipe.layers, *shape, self._device)
        vocabulary = self._family.model.get_output_embeddings().out_features
        rules = self._generation.rules(prompts, vocabulary, recipe.repetition_penalty, recipe.max_new_tokens, self._device)
        ends, longest = self._generation.ends, recipe.max_new_tokens
        head = self._family.scores
        answers = decode(batch, last, rules=rules, head=head, forward=forward, eos=ends, max_new_tokens=longest, keep=keep)
        if keep is not None:
            found = keep.vectors(torch.arange(len(prompts), device=self._device))
            for answer, vectors in zip(answers, found, strict=True):
                answer.vectors = vectors
        return answers

    def _cross_the_scaling(self, requests: Sequence[Request]) -> bool:
        """Tell whether positions of some prompt depend on its length, and those of its prefix would be others."""
        limit = self._family.scaled_from
        return limit is not None and any(r.num_tokens + r.recipe.max_new_tokens > limit for r in requests)

    def _samples(self, made: Sequence[tuple[dict[str, Tensor], dict[str, Any], Answer]]) -> list[Sample]:
        """Return samples of vectors on the device, facts and answers."""
        tokenizer = self._family.processor.tokenizer
        return [
            Sample(vectors, tokenizer.decode(answer.ids, skip_special_tokens=True).strip(), facts | answer.facts)
            for vectors, (_, facts, answer) in zip(to_host([vectors | answer.vectors for vectors, _, answer in made]), made)
        ]


def _stacked(extras: Sequence[Tensor | None]) -> Tensor | None:
    found = [extra for extra in extras if extra is not None]
    return torch.cat(found) if found else None

"""The Qwen2.5-VL engine: hidden states and greedy answers for a batch of questions, the image computed once.

The question comes after the image and attention is causal, so everything up to the last image token is the same for all
questions of an image. A batch therefore runs in four steps: the vision tower per image, the prefix [head | image] per image,
the suffixes [question | tail] over the prefixes' KV cache expanded to the questions, and greedy decoding from the same
cache. Both prefills are padded on the left, so that the last image token and the last prompt token are at index -1, where
hooks on the decoder layers take the vectors.

Knows nothing of runs, files or queues. Imported in an engine process only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file

from storage.sample import Sample
from workers.engine import EngineSpec, ModelCard, Request
from workers.errors import EngineStartError
from workers.prompt import split_prompt

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class QwenEngine:
    """A loaded Qwen2.5-VL checkpoint of any size on one device."""

    def __init__(self, spec: EngineSpec) -> None:
        source: dict[str, Any] = {"cache_dir": spec.cache_dir}
        if not Path(spec.model).is_dir():
            source["revision"] = spec.revision
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(spec, source).to(self._device).eval()
        processor = AutoProcessor.from_pretrained(spec.model, **source)
        self._images = processor.image_processor
        self._tokenizer = processor.tokenizer
        self._decoder = self._model.model.language_model
        self._visual = self._model.model.visual
        self._image_token = self._model.config.image_token_id
        config, generation = self._model.config, self._model.generation_config
        self._eos = _as_ids(generation.eos_token_id)
        self._penalty = float(generation.repetition_penalty or 1.0)
        prompt = split_prompt(processor)
        text, vision = config.get_text_config(), config.vision_config
        minimum, maximum = _pixel_limits(self._images)
        self.card = ModelCard(
            model_type=config.model_type,
            revision=getattr(config, "_commit_hash", None) or spec.revision,
            config_sha256=hashlib.sha256(
                Path(cached_file(spec.model, "config.json", **source)).read_bytes()
            ).hexdigest(),
            template_sha256=prompt.sha256,
            num_hidden_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vision_hidden_size=vision.hidden_size,
            max_position_embeddings=text.max_position_embeddings,
            repetition_penalty=self._penalty,
            tokenizer_json=self._tokenizer.backend_tokenizer.to_str(),
            head_ids=prompt.head_ids,
            after_image_ids=prompt.after_image_ids,
            tail_ids=prompt.tail_ids,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=minimum,
            max_pixels=maximum,
            environment=_environment(self._device, config._attn_implementation),
        )

    @torch.inference_mode()
    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request, in their order. All requests have the same layers and answer length."""
        pixels: dict[str, np.ndarray] = {}
        for request in requests:
            pixels.setdefault(request.image_key, request.pixels)
        images = self._see(list(pixels.values()))
        row_of = {key: row for row, key in enumerate(pixels)}
        rows = torch.tensor([row_of[request.image_key] for request in requests], device=self._device)
        layers = requests[0].layers

        with self._taking(layers) as vision_vectors:
            state = self._prefill_images(images)
        state.select(rows)
        suffixes = [request.suffix_ids for request in requests]
        with self._taking(layers) as query_vectors:
            last = self._prefill_suffixes(state, suffixes)

        prompts = [self._prompt_ids(images[row], s) for row, s in zip(rows.tolist(), suffixes)]
        answers = self._decode(state, last, prompts, requests[0].max_new_tokens)

        samples = []
        for i, row in enumerate(rows.tolist()):
            image = images[row]
            vectors = {
                "vision_only_representation": image.merged_mean,
                "vision_encoder_representation": image.encoder_mean,
                **{f"vision_token_representation/layer_{n}": v[row] for n, v in vision_vectors.items()},
                **{f"query_token_representation/layer_{n}": v[i] for n, v in query_vectors.items()},
            }
            last_image_token = len(self.card.head_ids) + len(image.tokens) - 1
            facts = {
                "seq_len": len(prompts[i]),
                "vision_token_position": last_image_token,
                "query_token_position": len(prompts[i]) - 1,
                "image_grid_thw": list(image.grid),
                "num_vision_tokens": len(image.tokens),
                **answers[i].facts,
                **self.card.environment,
            }
            samples.append(Sample({name: _to_numpy(v) for name, v in vectors.items()}, answers[i].text, facts))
        return samples

    def _see(self, pixels: Sequence[np.ndarray]) -> list[_Image]:
        """Run the vision tower once per image."""
        patches = self._images(images=list(pixels), do_resize=False, return_tensors="pt")
        grid = patches["image_grid_thw"].to(self._device)
        states = patches["pixel_values"].to(self._device, self._model.dtype)
        with _outputs({0: self._visual.blocks[-1]}, lambda out: out) as taken:
            out = self._visual(states, grid_thw=grid)
        merged = out if isinstance(out, Tensor) else out.pooler_output  # (tokens, D); an output object since 5.0
        sizes: list[int] = grid.prod(dim=1).tolist()
        # The last block's rows are in window order, but each image's rows stay together.
        encoded = torch.split(taken[0], sizes)  # each (patches, E)
        tokens = torch.split(merged, [size // self.card.merge_size**2 for size in sizes])  # each (tokens, D)
        return [_Image(t, tuple(g), t.mean(0), e.mean(0)) for t, e, g in zip(tokens, encoded, grid.tolist())]

    def _prefill_images(self, images: Sequence[_Image]) -> _State:
        """Run [head | image] of every image; the cache's rows are the images."""
        head = self._embed(self.card.head_ids)  # (H, D)
        rows = [torch.cat([head, image.tokens]) for image in images]
        positions = [self._prefix_positions(image.grid) for image in images]
        nexts = torch.tensor([int(p.max()) + 1 for p in positions], device=self._device)
        state = _State(
            DynamicCache(config=self._model.config), torch.zeros(len(rows), 0, device=self._device).long(), nexts
        )
        self._forward(
            state, _pad_left(rows), _pad_left([p.T for p in positions]).permute(2, 0, 1), [len(r) for r in rows]
        )
        return state

    def _prefill_suffixes(self, state: _State, suffixes: Sequence[tuple[int, ...]]) -> Tensor:
        """Run the suffixes over the expanded cache. Return the last prompt token's final states, (B, D)."""
        rows = [self._embed(ids) for ids in suffixes]
        lengths = torch.tensor([len(ids) for ids in suffixes], device=self._device)
        width = int(lengths.max())
        offsets = torch.arange(width, device=self._device) - (width - lengths)[:, None]  # (B, L), negative on padding
        positions = (state.next_position[:, None] + offsets.clamp(min=0)).expand(3, -1, -1)
        states = self._forward(state, _pad_left(rows), positions, lengths.tolist())
        state.next_position = state.next_position + lengths
        return states[:, -1]

    def _decode(
        self, state: _State, last: Tensor, prompts: Sequence[tuple[int, ...]], max_new_tokens: int
    ) -> list[_Answer]:
        """Continue every prompt greedily; a finished row leaves the batch."""
        answers = [_Answer([], [], None, "length") for _ in prompts]
        if max_new_tokens == 0:
            return [_Answer([], [], None, "none") for _ in prompts]
        alive = list(range(len(prompts)))
        seen = self._seen(prompts)
        eos = torch.tensor(self._eos, device=self._device)
        for step in range(max_new_tokens):
            logits = self._model.lm_head(last).float()  # (B, V)
            log_probabilities = logits.log_softmax(-1)
            penalised = torch.where(
                seen, torch.where(logits < 0, logits * self._penalty, logits / self._penalty), logits
            )
            tokens = penalised.argmax(-1)  # (B,)
            taken = log_probabilities.gather(1, tokens[:, None])[:, 0].tolist()
            if step == 0:
                entropies = torch.special.entr(log_probabilities.exp()).sum(-1).tolist()
            for row, token, log_probability in zip(alive, tokens.tolist(), taken):
                answers[row].ids.append(token)
                answers[row].log_probabilities.append(log_probability)
            ended = torch.isin(tokens, eos)
            for row, end in zip(alive, ended.tolist()):
                if end:
                    answers[row].finish_reason = "eos"
            if step + 1 == max_new_tokens or bool(ended.all()):
                break
            if bool(ended.any()):
                keep = (~ended).nonzero()[:, 0]
                state.select(keep)
                seen, tokens = seen[keep], tokens[keep]
                alive = [alive[i] for i in keep.tolist()]
            seen[torch.arange(len(alive), device=self._device), tokens] = True
            positions = state.next_position[None, :, None].expand(3, -1, -1)
            embedded = self._model.get_input_embeddings()(tokens)[:, None]
            last = self._forward(state, embedded, positions, [1] * len(alive))[:, -1]
            state.next_position = state.next_position + 1
        for answer, entropy in zip(answers, entropies):
            answer.entropy = entropy
            answer.text = self._tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        return answers

    def _forward(self, state: _State, embedded: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run the decoder on left-padded rows (B, L, D) with positions (3, B, L); extend the state's cache and mask."""
        width = embedded.shape[1]
        lengths_column = torch.tensor(lengths, device=self._device)[:, None]
        mask = (torch.arange(width, device=self._device) >= width - lengths_column).long()
        state.mask = torch.cat([state.mask, mask], dim=1)
        out = self._decoder(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=state.mask,
            past_key_values=state.cache,
            use_cache=True,
        )
        states: Tensor = out.last_hidden_state
        return states

    def _embed(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self._model.get_input_embeddings()(torch.tensor(ids, device=self._device))
        return embedded

    def _prefix_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Return mRoPE positions of [head | image], (3, H + tokens): text counts on, an image token is at (row, column)."""
        head = len(self.card.head_ids)
        _, height, width = (grid[0], grid[1] // self.card.merge_size, grid[2] // self.card.merge_size)
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + head
        return torch.cat([torch.arange(head).expand(3, -1), image], dim=1).to(self._device)

    def _prompt_ids(self, image: _Image, suffix: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.card.head_ids, *([self._image_token] * len(image.tokens)), *suffix)

    def _seen(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Return which tokens the repetition penalty falls on, (B, V)."""
        seen = torch.zeros(len(prompts), self._model.lm_head.out_features, dtype=torch.bool)
        for row, ids in zip(seen, prompts):
            row[list(set(ids))] = True
        return seen.to(self._device)

    def _taking(self, layers: Sequence[int]) -> Any:
        """Take decoder layers' outputs at the last position, each (B, D). A copy: a view would keep (B, L, D) alive."""
        return _outputs({i: self._decoder.layers[i] for i in layers}, lambda out: out[:, -1].clone())


@dataclass(slots=True)
class _Image:
    """An image after the vision tower."""

    tokens: Tensor  # (tokens, D)
    grid: tuple[int, int, int]  # in patches: time, height, width
    merged_mean: Tensor  # (D,)
    encoder_mean: Tensor  # (E,)


@dataclass(slots=True)
class _State:
    """A batch between two forwards."""

    cache: DynamicCache
    mask: Tensor  # (B, cached tokens), 0 on padding
    next_position: Tensor  # (B,)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; a row may be repeated."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.next_position = self.next_position[rows]


@dataclass(slots=True)
class _Answer:
    """A generated answer. Log-probabilities and the first token's entropy are the model's, before the penalty, in nats."""

    ids: list[int]
    log_probabilities: list[float]
    entropy: float | None
    finish_reason: str
    text: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept beside the text."""
        if self.entropy is None:
            return {"finish_reason": self.finish_reason}
        return {
            "finish_reason": self.finish_reason,
            "num_answer_tokens": len(self.ids),
            "answer_token_ids": self.ids,
            "answer_token_logprobs": self.log_probabilities,
            "first_token_entropy": self.entropy,
        }


@contextmanager
def _outputs(modules: dict[int, torch.nn.Module], take: Any) -> Iterator[dict[int, Tensor]]:
    """Collect what `take` makes of each module's output while the context lasts."""
    taken: dict[int, Tensor] = {}

    def hook(key: int) -> Any:
        def collect(_module: Any, _inputs: Any, out: Any) -> None:
            taken[key] = take(out[0] if isinstance(out, tuple) else out)  # a tuple before transformers 5

        return collect

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _load(spec: EngineSpec, source: dict[str, Any]) -> Any:
    """Load the weights. Raises EngineStartError where transformers would warn and fill in random ones."""
    kind = AutoConfig.from_pretrained(spec.model, **source).model_type
    if kind != "qwen2_5_vl":
        raise EngineStartError(f"it is a {kind} model, not Qwen2.5-VL")
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        spec.model, dtype=_DTYPES[spec.dtype], attn_implementation="sdpa", output_loading_info=True, **source
    )
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(f"the checkpoint lacks {len(missing)} of the model's weights, among them {missing[0]}")
    return model


def _pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows (L_i, *) to (B, max L, *) with zeros on the left."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")


def _to_numpy(vector: Tensor) -> np.ndarray:
    vector = vector.contiguous().cpu()
    if vector.dtype == torch.bfloat16:
        return vector.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return vector.numpy()


def _as_ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pixel_limits(images: Any) -> tuple[int, int]:
    """Return the processor's pixel limits; they moved into `size` in transformers 5."""
    size = images.size
    minimum = getattr(images, "min_pixels", None) or size["shortest_edge"]
    maximum = getattr(images, "max_pixels", None) or size["longest_edge"]
    return int(minimum), int(maximum)


def _environment(device: torch.device, attention: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "",
        "attention_implementation": attention,
        "library_versions": json.dumps(versions),
    }

"""Models with random weights on a device, and questions for them: no network, no checkpoint.

Images are noise in mixed sizes, questions random tokens, and every answer is forced to its length, so that the work is that of
a real run and repeats exactly.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from roofline import Case
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.engine.prompt import PromptParts

# The published config.json, where it differs from the small model's, whose tokenizer and token ids serve every size.
_MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "max_window_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        "rope_scaling": _MROPE, "vision_config": {**_VISION, "out_hidden_size": 3584},
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "max_window_layers": 70,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_scaling": _MROPE, "vision_config": {**_VISION, "out_hidden_size": 2048},
    },
    "tiny": {},
}  # fmt: skip

ASPECTS = (4 / 3, 3 / 4, 1.0, 3 / 2, 16 / 9)


def make_model(name: str, device: torch.device, directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Return a model with random weights on the device, and a processor; their files are in the directory."""
    build_small_model(directory, TEST)
    file = directory / "config.json"
    small = json.loads(file.read_text())
    own = CONFIGS[name]
    vision = {**small["vision_config"], **own.get("vision_config", {})}
    file.write_text(json.dumps({**small, **own, "vision_config": vision}))
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            AutoConfig.from_pretrained(directory), dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval(), AutoProcessor.from_pretrained(directory)


def make_engine(model: Any, directory: Path) -> ModelEngine:
    """Return the worker's engine around a model that is in memory."""
    with mock.patch("workers.engine.loading._load_model", lambda *_: model):
        return ModelEngine(EngineSpec("model", str(directory), "main", "bfloat16", str(directory)))


class Questions:
    """Makes cases: images of noise, questions of 6 to 24 random tokens."""

    def __init__(self, parts: PromptParts, image_token: int, layers: tuple[int, ...], seed: int = 0) -> None:
        self._parts = parts
        self._image_token = image_token
        self._layers = layers
        self._random = np.random.default_rng(seed)

    def mixed(self, number: int, per_image: int, image_tokens: int) -> list[Case]:
        """Return questions whose images have `image_tokens` in the mean: half of them between 0.8 and 1.2 of it."""
        cases: list[Case] = []
        for _ in range(-(-number // per_image)):
            tokens = image_tokens * np.clip(self._random.lognormal(-0.045, 0.3), 0.3, 2.5)
            aspect = self._random.choice(ASPECTS)
            width = max(2, round(math.sqrt(tokens * aspect)))
            cases += self.of_image(max(2, round(tokens / width)), width, per_image)
        return cases[:number]

    def of_image(self, height: int, width: int, number: int) -> list[Case]:
        """Return questions about an image of so many merged tokens."""
        pixels = self._random.integers(0, 256, (height * 28, width * 28, 3), dtype=np.uint8)
        key = self._random.bytes(8).hex()
        cases = []
        for _ in range(number):
            question = self._random.integers(256, 8000, self._random.integers(6, 25)).tolist()
            suffix = (*self._parts.after_image_ids, *question, *self._parts.tail_ids)
            prompt = (*self._parts.head_ids, *[self._image_token] * (height * width), *suffix)
            request = Request(key, (pixels,), suffix, len(prompt), Recipe(layers=self._layers, max_new_tokens=0))
            cases.append(Case(request, prompt, (1, 2 * height, 2 * width), 0))
        return cases


def with_answers(cases: Sequence[Case], answers: str) -> list[Case]:
    """Give every question its answer's length: a number of tokens, or `mix`."""
    random = np.random.default_rng(1)
    lengths = [int(answers)] * len(cases) if answers != "mix" else [_mixed_length(random) for _ in cases]
    recipe = cases[0].request.recipe.model_copy(update={"max_new_tokens": max(lengths)})
    return [replace(c, length=n, request=replace(c.request, recipe=recipe)) for c, n in zip(cases, lengths)]


def _mixed_length(random: np.random.Generator) -> int:
    """30% of 2 or 3 tokens (yes and no), else lognormal with mean 50, at most 200."""
    if random.random() < 0.3:
        return int(random.integers(2, 4))
    return int(np.clip(round(random.lognormal(math.log(50) - 0.8**2 / 2, 0.8)), 1, 200))


@contextmanager
def forced_answers(engine: ModelEngine, cases: Sequence[Case]) -> Iterator[None]:
    """Give the answers to these cases their lengths: no token ends one, and each slot has a limit of its own."""
    lengths = {case.prompt: case.length for case in cases}
    slots = engine._slots
    if slots is None:
        raise RuntimeError("the engine pads questions here: see its log")
    take = slots.take

    def limited(owners: Any, rows: Any, of: Any, prompts: Any, suffixes: Any, limits: Any) -> Any:
        return take(owners, rows, of, prompts, suffixes, [lengths[tuple(prompt)] for prompt in prompts])

    none = torch.empty(0, dtype=torch.long, device=engine._device)
    with mock.patch.object(slots, "take", limited), mock.patch.object(slots, "_ends", none):
        yield


def model_inputs(model: Any, processor: Any, case: Case) -> dict[str, torch.Tensor]:
    """Return what the processor would make of a case."""
    patches = processor.image_processor(images=[*case.request.images], do_resize=False, return_tensors="pt")
    ids = torch.tensor([case.prompt], device=model.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches["pixel_values"].to(model.device, model.dtype),
        "image_grid_thw": patches["image_grid_thw"].to(model.device),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # since transformers 5
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return inputs


def batches_of(cases: Sequence[Case], size: int, tokens: int) -> list[list[Case]]:
    """Cut as the worker's batcher does, but in order: by count, and by questions times the longest one's tokens."""
    batches: list[list[Case]] = [[]]
    for case in cases:
        batch = batches[-1]
        longest = max(c.request.num_tokens for c in (*batch, case))
        if len(batch) == size or (batch and (len(batch) + 1) * longest > tokens):
            batches.append([])
        batches[-1].append(case)
    return batches


def extract(engine: ModelEngine, cases: Sequence[Case]) -> int:
    """Run a batch; where memory does not suffice, halve it as the worker's batcher does. Return how often it was halved."""
    short = False
    try:
        samples = engine.extract([case.request for case in cases])
    except torch.OutOfMemoryError:
        if len(cases) == 1:
            raise
        short = True
    if not short:
        found = [sample.facts.get("num_answer_tokens", 0) for sample in samples]
        if found != [case.length for case in cases]:
            raise RuntimeError(f"answers of {found} tokens; forced were {[case.length for case in cases]}")
        return 0
    engine.free_cache()  # not in the handler: the traceback holds on to the tensors
    middle = len(cases) // 2
    return 1 + extract(engine, cases[:middle]) + extract(engine, cases[middle:])

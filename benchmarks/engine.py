"""The engine against the reference way: the same model, the same questions, the same run, one thread.

The reference way is what the script that this project replaces does: three forwards a question, batch 1 (the vision tower
for the vision-only vector, the whole model for hidden states, `generate` for the answer). "One forward" is that way without
its waste: a single pass at batch 1 that keeps the cache for decoding.

    python benchmarks/engine.py [--repeats 3]
    python benchmarks/engine.py --quick    # a tiny model and few questions: does it run?
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # shared cores: with a thread per core the same work took ten times longer

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import skimage.data
import torch
from common import print_table
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from workers.checkpoint.identity import resolve_layers
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import BENCH, TEST
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.extract.preprocess import Preprocessor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "grass", "moon")
QUESTIONS = (
    "What is in the image?",
    "Is there a person in this picture? Answer yes or no.",
    "What colour is the largest object?",
    "How many objects are there, and where do they lie?",
    "Was this taken indoors?",
    "Describe the background in one sentence.",
)
MAX_PIXELS = 256 * 28 * 28
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One question: for the engine, and as the processor prepares it for the reference way."""

    request: Request
    inputs: dict[str, torch.Tensor]


def make_cases(engine: ModelEngine, processor: Any, images: int, questions: int, directory: Path) -> list[Case]:
    """Return `images` x `questions` cases; more images than photographs are crops of them."""
    preprocess = Preprocessor(engine.info)
    recipe = Recipe(layers=resolve_layers(None, engine.info.num_hidden_layers), max_new_tokens=0)
    cases = []
    for number in range(images):
        image = Image.fromarray(getattr(skimage.data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])()).convert("RGB")
        shift = 8 * (number // len(PHOTOGRAPHS))
        path = directory / f"{number}.png"
        image.crop((shift, shift, image.width, image.height)).save(path)
        prepared = preprocess.image(path.name, directory, (), (engine.info.min_pixels, MAX_PIXELS))
        for question in QUESTIONS[number % 6 :][:questions] if questions == 1 else QUESTIONS[:questions]:
            content = [
                {"type": "image", "image": str(path), "max_pixels": MAX_PIXELS},
                {"type": "text", "text": question},
            ]
            messages = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            seen = process_vision_info(messages)[0]
            inputs = dict(processor(text=[text], images=seen, do_resize=False, return_tensors="pt"))
            cases.append(Case(preprocess.request([prepared], question, recipe), inputs))
    return cases


@torch.inference_mode()
def reference_way(model: Any, cases: Sequence[Case], tokens: int) -> None:
    """Three forwards a question, whether or not the answer is wanted."""
    for case in cases:
        model.model.visual(case.inputs["pixel_values"], grid_thw=case.inputs["image_grid_thw"])
        model(**case.inputs, output_hidden_states=True)
        model.generate(**case.inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)


@torch.inference_mode()
def one_forward(model: Any, cases: Sequence[Case], tokens: int) -> None:
    """One forward a question: hidden states by hooks while the answer is generated."""
    for case in cases:
        if tokens:
            model.generate(**case.inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        else:
            model.model(**case.inputs)


def with_engine(engine: ModelEngine, cases: Sequence[Case], tokens: int, size: int) -> None:
    """Batches of `size` questions."""
    engine.free_cache()  # the image prefixes of an earlier run of this cell
    requests = [replace(c.request, recipe=c.request.recipe.model_copy(update={"max_new_tokens": tokens})) for c in cases]
    for start in range(0, len(requests), size):
        engine.extract(requests[start : start + size])


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Return the median time of some work."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell; the median counts")
    parser.add_argument("--batch", type=int, default=48, help="questions in a batch of the engine")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few questions, to see that it works")
    options = parser.parse_args()
    sets, answer_tokens, preset = ([(2, 6), (4, 1)], 4, TEST) if options.quick else ([(8, 6), (48, 1)], ANSWER_TOKENS, BENCH)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = build_small_model(Path(scratch) / "model", preset)
        processor = AutoProcessor.from_pretrained(directory)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        engine = ModelEngine(EngineSpec("model", str(directory), "main", "float32", scratch))
        engine._generation.ends = []  # forced answers: neither way may stop early
        rows = []
        for images, questions in sets:
            cases = make_cases(engine, processor, images, questions, Path(scratch))
            base = seconds(partial(reference_way, model, cases, answer_tokens), options.repeats)  # it has no other mode
            for tokens in (answer_tokens, 0):
                single = seconds(partial(one_forward, model, cases, tokens), options.repeats)
                ours = seconds(partial(with_engine, engine, cases, tokens, options.batch), options.repeats)
                name = f"{images} images x {questions}, " + (f"{tokens} answer tokens" if tokens else "embeddings only")
                rate = len(cases) / ours
                rows.append(
                    [
                        name,
                        f"{base:.1f}",
                        f"{single:.1f}",
                        f"{ours:.2f}",
                        f"{rate:.1f}",
                        f"{base / ours:.1f}x",
                        f"{single / ours:.1f}x",
                    ]
                )
        print_table(
            [
                "questions",
                "reference way, s",
                "one forward, s",
                "engine, s",
                "engine, samples/s",
                "against the reference",
                "against one forward",
            ],
            rows,
        )


if __name__ == "__main__":
    main()

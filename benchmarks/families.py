"""Every family's engine: how near it is to plain transformers, and what sharing an image between its questions gains.

Random weights in each family's genuine architecture, with a decoder of 512 x 8 layers and a small tower; 8 images, 6 questions
each, in float32 on one thread. "whole" is the same engine with one whole prompt at a time, as `--exact` computes. Errors are
max|a-b| / max|b| of every layer's vectors on 4 images with 3 questions each, in one batch, at the tests' size.

    python benchmarks/families.py [FAMILY…] [--repeats 3]
    python benchmarks/families.py --quick      # tiny widths: does it run?
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers
from common import print_table
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support import tiny
from tests.support.plain import Plain
from workers.engine.interface import Engine, EngineSpec, Recipe, Request
from workers.engine.process import make_engine
from workers.extract.preprocess import Preprocessor, limits_of

QUESTIONS = (
    "What is in the image?",
    "Is there a person in this picture? Answer yes or no.",
    "What colour is the largest object?",
    "How many objects are there, and where do they lie?",
    "Was this taken indoors?",
    "Describe the background in one sentence.",
)
SIZES = ((90, 150), (210, 100), (120, 120), (60, 240), (150, 90), (100, 210), (180, 180), (240, 60))  # height, width
NEW = 8
BENCH = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of tests/support/tiny.py; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny widths: does it run?")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        pictures(place)
        for family in options.families or list(tiny.FAMILIES):
            error = errors(family, place)
            shared, whole = speeds(family, place, options.repeats, {} if options.quick else BENCH)
            rows.append([family, *error, f"{shared:.1f}", f"{whole:.1f}", f"{shared / whole:.1f}x"])
    print_table(["family", "image token", "prompt token", "answers", "shared, samples/s", "whole", "ratio"], rows)


def pictures(directory: Path) -> None:
    """Write images of noise that is smooth, of several shapes."""
    random = np.random.default_rng(7)
    for number, (height, width) in enumerate(SIZES):
        small = Image.fromarray(random.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(directory / f"{number}.png")


def load(model: Path) -> Engine:
    """Return a checkpoint's engine."""
    return make_engine(EngineSpec("model", str(model), "main", "float32", "unused"))


def requests_of(engine: Engine, directory: Path, recipe: Recipe, images: int, questions: int) -> list[Request]:
    """Return the requests of some images, each with some questions."""
    prepare, limits = Preprocessor(engine.info), limits_of((None, None), engine.info)
    found = []
    for number in range(images):
        image = prepare.image(f"{number}.png", directory, (), limits)
        found += [prepare.request([image], text, recipe) for text in QUESTIONS[:questions]]
    return found


def errors(family: str, directory: Path) -> tuple[str, str, str]:
    """Return the worst errors at the last image token and the last prompt token, and how many answers are the same."""
    model = tiny.build_tiny(family, directory / family)
    engine, plain = load(model), Plain(model)
    recipe = Recipe(layers=tuple(range(engine.info.num_hidden_layers)), max_new_tokens=NEW)
    requests = requests_of(engine, directory, recipe, 4, 3)
    processing = {"do_resize": False} if engine.info.factor else {}
    worst, same = {"vision": 0.0, "query": 0.0}, 0
    for i, (request, sample) in enumerate(zip(requests, engine.extract(requests))):
        expected = plain(request.images, QUESTIONS[i % 3], new=NEW, **processing)
        for name, vector in expected.vectors.items():
            error = float(np.abs(sample.vectors[name] - vector).max() / np.abs(vector).max())
            kind = name.partition("_")[0]
            worst[kind] = max(worst[kind], error) if np.isfinite(error) else float("inf")
        same += sample.facts["answer_token_ids"] == expected.answer
    return f"{worst['vision']:.0e}", f"{worst['query']:.0e}", f"{same}/{len(requests)}"


def speeds(family: str, directory: Path, repeats: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Return samples a second with shared images, and with whole prompts."""
    before = dict(tiny.TEXT)
    tiny.TEXT.update(sizes)
    try:
        engine = load(tiny.build_tiny(family, directory / f"{family}-wide"))
    finally:
        tiny.TEXT.update(before)
    shared = requests_of(engine, directory, Recipe(layers=(0, 3), max_new_tokens=NEW), len(SIZES), len(QUESTIONS))
    whole = [replace(request, recipe=request.recipe.model_copy(update={"exact": True})) for request in shared]
    found = []
    for requests in (shared, whole):
        times = []
        for _ in range(repeats):
            engine.free_cache()
            begun = time.perf_counter()
            engine.extract(requests)
            times.append(time.perf_counter() - begun)
        found.append(len(requests) / statistics.median(times))
    return found[0], found[1]


if __name__ == "__main__":
    main()

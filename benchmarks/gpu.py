"""The engine on a GPU against the reference way, with random weights: no network, no checkpoint.

A Qwen2.5-VL of a published size is made on the device in bfloat16; images are noise in mixed sizes, questions random
tokens, and every answer is forced to its length, so that the work is that of a real run and repeats exactly. The engine is
the worker's own, in batches as the worker forms them. Utilisation is against the roofline: the time that the device needs at
its peak for the floating-point operations and bytes that the questions take without padding (an image's tower and prefix once).

    python benchmarks/gpu.py [--config 7b] [--per-image 1 2 6] [--answers 20 200 mix 0]
    python benchmarks/gpu.py --sizes --memory-cap 24    # one image of up to 16k tokens, six questions, on a 24 GB card
    python benchmarks/gpu.py --config tiny --quick      # does it run? seconds on a CPU
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import inspect
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from common import print_table
from roofline import STAGES, Case, Counter, Peak, Work, find_peak
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from workers.checkpoint.identity import resolve_layers
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.engine.prompt import PromptParts, split_prompt

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
SIZES = (1024, 2048, 4096, 8192, 16384)


# --- the model and its questions -------------------------------------------------------------------------------------


def make_model(name: str, device: torch.device, directory: Path) -> tuple[Any, Any]:
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
            AutoConfig.from_pretrained(directory), dtype=torch.bfloat16, attn_implementation="sdpa"
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
            request = Request(key, pixels, suffix, len(prompt), Recipe(layers=self._layers, max_new_tokens=0))
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


# --- forced answers --------------------------------------------------------------------------------------------------


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


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass
class Timers:
    """Adds up the time of stages: between events on the GPU, which do not make it wait, or by the clock on a CPU."""

    cuda: bool
    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begun = self._now()
            result = function(*arguments, **options)
            self.spans.setdefault(stage, []).append((begun, self._now()))
            return result

        return timed

    def seconds(self, stage: str) -> float:
        """Return a stage's time so far."""
        spans = self.spans.get(stage, [])
        return sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def stages_timed(engine: Any, timers: Timers) -> Iterator[None]:
    """Time the engine's stages while the context lasts."""
    slots = engine._slots
    parts = (
        (engine._family.core.visual, "forward", "vision"),
        (engine._prefixes, "run", "images"),
        (slots, "take", "suffix"),
        (slots, "run", "suffix"),
        (slots, "decode", "decode"),
    )
    with ExitStack() as stack:
        for owner, name, stage in parts:
            stack.enter_context(mock.patch.object(owner, name, timers.around(stage, getattr(owner, name))))
        yield


def synchronised(device: torch.device) -> float:
    """Return the time once the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the ways --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def reference_way(model: Any, inputs: dict[str, torch.Tensor], length: int) -> None:
    """Three forwards: the tower, the whole model for hidden states, and `generate`."""
    model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    model(**inputs, output_hidden_states=True)
    one_pass(model, inputs, length)


@torch.inference_mode()
def one_pass(model: Any, inputs: dict[str, torch.Tensor], length: int) -> None:
    """One forward, from whose cache the answer is decoded."""
    if length:
        model.generate(**inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length)
    else:
        model.model(**inputs)


def model_inputs(model: Any, processor: Any, case: Case) -> dict[str, torch.Tensor]:
    """Return what the processor would make of a case."""
    patches = processor.image_processor(images=[case.request.pixels], do_resize=False, return_tensors="pt")
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


# --- the tables ------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model with what measures it."""

    model: Any
    processor: Any
    counter: Counter
    peak: Peak
    device: torch.device

    def one_at_a_time(self, name: str, way: Callable[..., None], cases: Sequence[Case], answers: str) -> list[str]:
        """Measure a way of batch 1; return the table's row."""
        prepared = [(model_inputs(self.model, self.processor, case), case.length) for case in cases]
        way(self.model, prepared[0][0], min(2, prepared[0][1]))  # warm
        self._reset_peak()
        begun = synchronised(self.device)
        for inputs, length in prepared:
            way(self.model, inputs, length)
        taken = synchronised(self.device) - begun
        work = self.counter.stages([[case] for case in cases], whole=True)
        return [name, "1", answers, *self._figures(len(cases), taken, work), self._peak_memory()]

    def engine(
        self, engine: ModelEngine, batches: Sequence[Sequence[Case]], answers: str, name: str
    ) -> tuple[list[str], list[str]]:
        """Measure the engine; return the rows of both tables."""
        cases = [case for batch in batches for case in batch]
        timers = Timers(self.device.type == "cuda")
        halved = 0
        warm = with_answers(batches[0][:2], "2")
        with forced_answers(engine, warm):
            extract(engine, warm)
        engine.free_cache()
        self._reset_peak()
        with forced_answers(engine, cases), stages_timed(engine, timers):
            begun = synchronised(self.device)
            for batch in batches:
                halved += extract(engine, batch)
            taken = synchronised(self.device) - begun
        engine.free_cache()
        work = self.counter.stages(batches)
        size = f"{len(batches[0])}" + (f", halved {halved} times" if halved else "")
        first = [name, size, answers, *self._figures(len(cases), taken, work), self._peak_memory()]
        seconds = {stage: timers.seconds(stage) for stage in STAGES}
        seconds["prefix"] = timers.seconds("images") - seconds["vision"]
        other = taken - sum(seconds.values())
        stages = [self._stage(seconds[stage], work[stage]) for stage in STAGES]
        return first, [name, answers, *stages, f"{other:.2f}"]

    def _figures(self, number: int, taken: float, work: dict[str, Work]) -> list[str]:
        flops, least = sum(w.flops for w in work.values()), sum(w.seconds for w in work.values())
        utilisation = [f"{flops / taken / self.peak.flops:.0%}" if self.peak.flops else "–"]
        utilisation.append(f"{least / taken:.0%}" if least else "–")
        return [f"{number / taken:.2f}", f"{flops / number / 1e12:.3g}", *utilisation]

    def _stage(self, taken: float, work: Work) -> str:
        share = f" ({work.seconds / taken:.0%})" if taken and work.seconds else ""
        return f"{taken:.2f}{share}"

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory(self) -> str:
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if self.device.type == "cuda" else "–"


WAYS_HEADER = (
    "way", "batch", "answer tokens", "samples/s", "TFLOP/sample", "of peak FLOP/s", "of the roofline", "peak memory, GB",
)  # fmt: skip
STAGES_HEADER = ("engine", "answer tokens", *(f"{stage}, s" for stage in STAGES), "other, s")


def measure_ways(bench: Bench, questions: Questions, directory: Path, options: argparse.Namespace) -> None:
    """Print the tables of the reference way, of one pass and of the engine."""
    rows, stage_rows = [], []
    singles = questions.mixed(options.reference, 1, options.image_tokens)
    for name, way in [("reference: three forwards", reference_way), ("one pass", one_pass)]:
        for answers in options.answers if singles else ():
            if answers == "0" and way is reference_way:
                continue  # it knows no questions without answers
            rows.append(bench.one_at_a_time(name, way, with_answers(singles, answers), answers))
            note(rows[-1])
    engine = make_engine(bench.model, directory)  # after the ways above: it replaces the tower's attention
    for per_image in options.per_image:
        cases = questions.mixed(options.questions, per_image, options.image_tokens)
        mean = np.mean([case.request.num_tokens - len(case.request.suffix_ids) for case in cases])
        name = f"engine, {per_image} an image"
        note([name, f"prefixes of {mean:.0f} tokens in the mean"])
        for answers in options.answers:
            batches = batches_of(with_answers(cases, answers), options.batch, engine.info.max_batch_tokens)
            row, stage_row = bench.engine(engine, batches, answers, name)
            rows.append(row)
            stage_rows.append(stage_row)
            note(row)
    print_table(WAYS_HEADER, rows)
    print("\nTime by stage; in brackets the share of it that the roofline explains:\n")
    print_table(STAGES_HEADER, stage_rows)


def measure_sizes(bench: Bench, questions: Questions, directory: Path, options: argparse.Namespace) -> int:
    """Print the table of one large image with six questions each. Return how many did not fit."""
    engine = make_engine(bench.model, directory)
    rows, failed = [], 0
    for tokens in SIZES:
        side = round(math.sqrt(tokens * options.image_tokens / 400))
        cases = with_answers(questions.of_image(side, side, 6), "20")
        try:
            row, _ = bench.engine(engine, [cases], "20", f"{side * side:,} tokens x 6")
        except torch.OutOfMemoryError as error:
            row = [f"{side * side:,} tokens x 6", "1", "20", str(error).split(". ")[0], "", "", "", ""]
            failed += 1
        engine.free_cache()
        rows.append(row)
        note(row)
    print_table(("image", *WAYS_HEADER[1:]), rows)
    return failed


def note(row: Sequence[str]) -> None:
    """Say on stderr what has been measured: a run that is cut off has not been for nothing."""
    print(" | ".join(row), file=sys.stderr, flush=True)


def cap_memory(gigabytes: float, device: torch.device) -> None:
    """Let this process have, and see, so much of the device's memory."""
    total = torch.cuda.get_device_properties(device).total_memory
    cap = int(gigabytes * 1e9)
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    real = torch.cuda.mem_get_info

    def capped(*arguments: Any, **options: Any) -> tuple[int, int]:
        return max(0, min(real(*arguments, **options)[0], cap - torch.cuda.memory_reserved(device))), min(cap, total)

    torch.cuda.mem_get_info = capped


def describe(options: argparse.Namespace, model: Any, device: torch.device, peak: Peak) -> str:
    """Return the line above the tables."""
    weights = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parts = [
        f"{options.config} ({weights / 1e9:.2f} G random weights in bfloat16) on {name}",
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    ]
    if peak.flops:
        parts.append(f"peak {peak.flops / 1e12:.0f} TFLOP/s and {peak.bytes / 1e9:.0f} GB/s")
    if options.memory_cap:
        parts.append(f"memory capped at {options.memory_cap:g} GB")
    return "; ".join(parts) + "."


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="7b", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=192, help="in each of the engine's cells")
    parser.add_argument("--reference", type=int, default=6, help="questions of the batch-1 ways; 0 leaves them out")
    parser.add_argument("--per-image", type=int, nargs="+", default=[1, 2, 6])
    parser.add_argument("--answers", nargs="+", default=["20", "200", "mix", "0"], help="tokens; mix; 0: embeddings only")
    parser.add_argument("--image-tokens", type=int, default=400, help="the images' mean size")
    parser.add_argument("--batch", type=int, default=128, help="questions in one batch of the engine")
    parser.add_argument("--sizes", action="store_true", help="one image of 1k to 16k tokens with six questions instead")
    parser.add_argument("--memory-cap", type=float, metavar="GB", help="of the device's memory, for this process")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16; known for H100, H200, A100 and 4090")
    parser.add_argument("--peak-gbps", type=float, help="of the device's memory")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.reference, options.image_tokens, options.batch = 12, 2, 20, 8
        options.answers = ["3", "mix", "0"]
    return options


def main() -> int:
    """Print the tables."""
    options = read_options()
    device = torch.device(options.device)
    if device.type == "cuda" and options.memory_cap:
        cap_memory(options.memory_cap, device)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "Qwen2.5-VL-Random"
        model, processor = make_model(options.config, device, directory)
        peak = find_peak(options, device)
        config = model.config
        layers = resolve_layers(None, config.get_text_config().num_hidden_layers)
        questions = Questions(split_prompt(processor), config.image_token_id, layers)
        bench = Bench(model, processor, Counter(config, peak), peak, device)
        print(describe(options, model, device, peak), end="\n\n")
        if options.sizes:
            return min(1, measure_sizes(bench, questions, directory, options))
        measure_ways(bench, questions, directory, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The engine on a GPU, in one call of under nine minutes: with random weights, no network, no checkpoint.

A Qwen2.5-VL of a published size is made on the device in bfloat16 (random_model.py). The engine is the worker's own, in batches
as the worker forms them. Utilisation is against the roofline: the time that the device needs at its peak for the operations and
bytes that the questions take without padding (an image's tower and prefix once). torch and transformers are enough:

    PYTHONPATH=. python3 benchmarks/gpu.py
    PYTHONPATH=. python3 benchmarks/gpu.py --sections sizes --memory-cap 24
    PYTHONPATH=. python3 benchmarks/gpu.py --config tiny --quick     # does it run? seconds on a CPU
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import bare  # noqa: F401  (before the engine)
import numpy as np
import torch
import transformers
from common import print_table
from random_model import (
    CONFIGS,
    Questions,
    batches_of,
    extract,
    forced_answers,
    make_engine,
    make_model,
    model_inputs,
    with_answers,
)
from roofline import STAGES, Case, Counter, Peak, Work, find_peak
from stage_times import Timers, busy_share, stages_timed, synchronised
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from storage.sample import Sample
from workers.checkpoint.identity import resolve_layers
from workers.engine.model import ModelEngine
from workers.engine.prompt import split_prompt

SIZES = (1024, 4096, 16384)
NOT_MEASURED = "not measured: out of time"
SECTIONS = ("engine", "invariance", "small", "busy", "padded", "kernels", "sizes")


# --- ways to compute the same ----------------------------------------------------------------------------------------


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


@contextmanager
def padded(engine: ModelEngine) -> Iterator[None]:
    """Have the engine pad questions into one batch, as before there were slots; no token ends an answer."""
    with mock.patch.object(engine, "_slots", None), mock.patch.object(engine._generation, "ends", []):
        yield


@contextmanager
def without_graph(engine: ModelEngine) -> Iterator[None]:
    """Have the slots launch each kernel of a step by itself."""
    slots = engine._slots
    assert slots is not None
    with mock.patch.object(slots, "_captured", lambda: False):
        slots.release()
        yield
    slots.release()


@contextmanager
def cudnn(on: bool) -> Iterator[None]:
    """Let torch choose cuDNN's attention, or not."""
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model with what measures it, until the time is over."""

    model: Any
    processor: Any
    counter: Counter
    peak: Peak
    device: torch.device
    ends: float

    @property
    def is_over(self) -> bool:
        """Tell whether there is no time for another row."""
        return time.monotonic() > self.ends

    def one_at_a_time(self, name: str, way: Callable[..., None], cases: Sequence[Case], answers: str) -> list[str]:
        """Measure a way of batch 1; return the table's row."""
        if self.is_over:
            return row_of(name, "1", answers, NOT_MEASURED)
        prepared = [(model_inputs(self.model, self.processor, case), case.length) for case in cases]
        way(self.model, prepared[0][0], min(2, prepared[0][1]))  # warm
        self._reset_peak()
        begun = synchronised(self.device)
        for inputs, length in prepared:
            way(self.model, inputs, length)
        taken = synchronised(self.device) - begun
        work = self.counter.stages([[case] for case in cases], whole=True)
        return row_of(name, "1", answers, *self._figures(len(cases), taken, work), self._peak_memory())

    def engine(
        self, engine: ModelEngine, cases: Sequence[Case], answers: str, name: str, size: int, *, slots: bool = True
    ) -> tuple[list[str], list[str]]:
        """Measure the engine; return the rows of both tables."""
        if self.is_over:
            return row_of(name, str(size), answers, NOT_MEASURED), []
        cases = with_answers(cases, answers)
        batches = batches_of(cases, size, engine.info.max_batch_tokens)
        timers, halved = Timers(self.device.type == "cuda"), 0
        forced = forced_answers if slots else lambda *_: nullcontext()
        warm = with_answers(cases[:2], "6")
        with forced(engine, warm):
            extract(engine, warm)
        engine.free_cache()
        self._reset_peak()
        with forced(engine, cases), stages_timed(engine, timers) if slots else nullcontext():
            begun = synchronised(self.device)
            for batch in batches:
                halved += extract(engine, batch)
            taken = synchronised(self.device) - begun
        engine.free_cache()
        work = self.counter.stages(batches)
        count = f"{len(batches[0])}" + (f", halved {halved} times" if halved else "")
        first = row_of(name, count, answers, *self._figures(len(cases), taken, work), self._peak_memory())
        if not slots:
            return first, []
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


def row_of(*cells: str) -> list[str]:
    """Return a row of the table of ways, and say it on stderr at once: a run that is cut off has not been for nothing."""
    print(" | ".join(cells), file=sys.stderr, flush=True)
    return [*cells, *[""] * (len(WAYS_HEADER) - len(cells))]


# --- the sections ----------------------------------------------------------------------------------------------------


def measure_reference(bench: Bench, questions: Questions, options: argparse.Namespace) -> list[list[str]]:
    """Measure the batch-1 ways, before the engine changes the tower's attention; with cuDNN's attention, and without."""
    rows = []
    singles = questions.mixed(options.reference, 1, options.image_tokens)
    if "engine" in options.sections and singles:
        for answers in options.answers:
            if answers not in ("0", "mix"):
                rows.append(
                    bench.one_at_a_time("reference: three forwards", reference_way, with_answers(singles, answers), answers)
                )
            rows.append(bench.one_at_a_time("one pass", one_pass, with_answers(singles, answers), answers))
    if "kernels" in options.sections and singles:
        for on in (False, True):
            with cudnn(on):
                name = f"one pass, cuDNN {'on' if on else 'off'}, a shape each"
                fresh = questions.mixed(options.reference, 1, options.image_tokens)
                rows.append(bench.one_at_a_time(name, one_pass, with_answers(fresh, "4"), "4"))
    return rows


def measure_engine(
    bench: Bench, engine: ModelEngine, questions: Questions, options: argparse.Namespace
) -> tuple[list[list[str]], list[list[str]]]:
    """Measure slots, slots without a graph, and padded batches; the last with and without cuDNN's attention."""
    rows, stage_rows = [], []
    cells = {per: questions.mixed(options.questions, per, options.image_tokens) for per in options.per_image}
    if "engine" in options.sections:
        for answers in options.answers:
            for per_image, cases in cells.items():
                row, stages = bench.engine(engine, cases, answers, f"engine, {per_image} an image", options.batch)
                rows.append(row)
                stage_rows += [stages] if stages else []
        with without_graph(engine):
            name = f"engine, {options.per_image[0]} an image, no graph"
            rows.append(bench.engine(engine, cells[options.per_image[0]], options.answers[0], name, options.batch)[0])
    if "padded" in options.sections:
        for answers in (options.answers[0], "0"):
            for per_image, cases in cells.items():
                with padded(engine):
                    name = f"padded, {per_image} an image"
                    rows.append(bench.engine(engine, cases, answers, name, options.batch, slots=False)[0])
    if "kernels" in options.sections:
        for on in (False, True):
            with padded(engine), cudnn(on):
                name = f"padded, 1 an image, cuDNN {'on' if on else 'off'}"
                cases = questions.mixed(min(16, options.questions), 1, options.image_tokens)
                rows.append(bench.engine(engine, cases, "4", name, options.batch, slots=False)[0])
    return rows, stage_rows


def measure_invariance(bench: Bench, engine: ModelEngine, questions: Questions, options: argparse.Namespace) -> None:
    """Print how many vectors of a batch have the bits of batch 1, and how far the rest are."""
    cases = with_answers(questions.mixed(options.alone, 1, options.image_tokens), options.answers[0])

    def run(batches: Sequence[Sequence[Case]]) -> list[Sample]:
        found: list[Sample] = []
        with forced_answers(engine, cases):
            for batch in batches:
                engine.free_cache()
                found += engine.extract([case.request for case in batch])
        return found

    together = {"one batch": run([cases]), "the other way round": run([cases[::-1]])[::-1]}
    half = len(cases) // 2
    together["two batches"] = run([cases[:half], cases[half:]])
    alone: list[Sample] = []
    for case in cases:
        if bench.is_over:
            break
        alone += run([[case]])
    rows = []
    for name, samples in together.items():
        pairs = [(s.vectors[n].astype(np.float32), one.vectors[n].astype(np.float32)) for s, one in zip(samples, alone)
                 for n in one.vectors]  # fmt: skip
        same = sum(np.array_equal(a, b) for a, b in pairs)
        drift = max((float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs), default=math.nan)
        answers = sum(s.facts["answer_token_ids"] == one.facts["answer_token_ids"] for s, one in zip(samples, alone))
        rows.append([name, f"{same} of {len(pairs)}", f"{drift:.2g}", f"{answers} of {len(alone)}"])
    print(f"\nAgainst each question alone; at load it was found to be: {engine.info.environment['batch_invariance']}.\n")
    print_table(("questions in", "vectors with the same bits", "largest drift", "same answers"), rows)


def measure_small(bench: Bench, options: argparse.Namespace) -> None:
    """Print how far the engine and plain forwards in bfloat16 are from plain forwards in float32, of the small model."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "Qwen2.5-VL-Small"
        exact, processor = make_model("tiny", torch.device("cpu"), directory, dtype=torch.float32)
        exact.save_pretrained(directory)
        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        exact, rounded, ours = (
            load(directory, dtype=dtype).to(bench.device).eval() for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
        )
        engine = make_engine(ours, directory)
        processor = AutoProcessor.from_pretrained(directory)
        layers = resolve_layers(None, engine.info.num_hidden_layers)[:-1]  # the last one's output is normed in hidden_states
        questions = Questions(split_prompt(processor), exact.config.image_token_id, layers)
        cases = [replace(case, length=0) for case in questions.mixed(24, 3, 60)]
        samples = engine.extract([case.request for case in cases])
        errors: dict[str, list[float]] = {"engine, one batch": [], "plain, batch 1": []}
        for case, sample in zip(cases, samples):
            inputs = model_inputs(exact, processor, case)
            right = states_of(exact, inputs, layers)
            plain = states_of(rounded, inputs, layers)
            for layer in layers:
                found = sample.vectors[f"query_token_representation/layer_{layer}"].astype(np.float32)
                for name, vector in (("engine, one batch", found), ("plain, batch 1", plain[layer])):
                    errors[name].append(float(np.abs(vector - right[layer]).max() / np.abs(right[layer]).max()))
    rows = [[name, f"{np.mean(found):.2g}", f"{max(found):.2g}"] for name, found in errors.items()]
    print(f"\nThe small model in bfloat16 against plain forwards in float32, {len(cases)} questions, {len(layers)} layers:\n")
    print_table(("way", "mean error", "largest error"), rows)


@torch.inference_mode()
def states_of(model: Any, inputs: dict[str, torch.Tensor], layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the last token's output of some layers by a plain forward."""
    given = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    states = model.model(**given, output_hidden_states=True).hidden_states
    return {layer: states[layer + 1][0, -1].float().cpu().numpy() for layer in layers}


def measure_busy(bench: Bench, engine: ModelEngine, questions: Questions, options: argparse.Namespace) -> None:
    """Print the share of a batch's time in which the device runs something."""
    rows = []
    for per_image in options.per_image:
        for answers in (options.answers[0], "0"):
            if bench.is_over:
                rows.append([f"{per_image} an image", answers, NOT_MEASURED, ""])
                continue
            cases = with_answers(questions.mixed(options.batch, per_image, options.image_tokens), answers)
            with forced_answers(engine, cases):
                found = busy_share(bench.device, lambda cases=cases: engine.extract([case.request for case in cases]))
            engine.free_cache()
            share, number = ("–", "–") if found is None else (f"{found[0]:.0%}", f"{found[1]:,}")
            rows.append([f"{per_image} an image", answers, share, number])
    print(f"\nOne batch of {options.batch} under torch's profiler, which slows the host:\n")
    print_table(("engine", "answer tokens", "device busy", "kernels and copies"), rows)


def measure_sizes(bench: Bench, engine: ModelEngine, questions: Questions, options: argparse.Namespace) -> int:
    """Print the table of one large image with six questions each. Return how many did not fit."""
    rows, failed = [], 0
    for tokens in SIZES:
        side = round(math.sqrt(tokens * options.image_tokens / 400))
        name = f"{side * side:,} tokens x 6"
        try:
            row, _ = bench.engine(engine, questions.of_image(side, side, 6), "20", name, 6)
        except torch.OutOfMemoryError as error:
            row = row_of(name, "1", "20", str(error).split(". ")[0])
            failed += 1
        engine.free_cache()
        rows.append(row)
    print(f"\nOne image{'' if options.memory_cap is None else f', memory capped at {options.memory_cap:g} GB'}:\n")
    print_table(("image", *WAYS_HEADER[1:]), rows)
    return failed


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
    return "; ".join(parts) + "."


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="7b", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--minutes", type=float, default=8.0, help="rows that would begin later are left out")
    parser.add_argument("--questions", type=int, default=192, help="in each of the engine's cells")
    parser.add_argument("--reference", type=int, default=4, help="questions of the batch-1 ways; 0 leaves them out")
    parser.add_argument("--alone", type=int, default=24, help="questions that are run alone, for invariance")
    parser.add_argument("--per-image", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--answers", nargs="+", default=["20", "0", "200", "mix"], help="tokens; mix; 0: embeddings only")
    parser.add_argument("--image-tokens", type=int, default=400, help="the images' mean size")
    parser.add_argument("--batch", type=int, default=128, help="questions in one batch of the engine")
    parser.add_argument("--memory-cap", type=float, metavar="GB", help="of the device's memory, for this process; "
                        "else 24 for the section `sizes` alone")  # fmt: skip
    parser.add_argument("--peak-tflops", type=float, help="dense bf16; known for H100, H200, A100 and 4090")
    parser.add_argument("--peak-gbps", type=float, help="of the device's memory")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.reference, options.image_tokens, options.batch, options.alone = 12, 2, 20, 8, 4
        options.answers = ["3", "0", "mix"]
    return options


def main() -> int:
    """Print the tables."""
    options = read_options()
    ends = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the worker does
    if device.type == "cuda" and options.memory_cap:
        cap_memory(options.memory_cap, device)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "Qwen2.5-VL-Random"
        model, processor = make_model(options.config, device, directory)
        peak = find_peak(options, device)
        config = model.config
        layers = resolve_layers(None, config.get_text_config().num_hidden_layers)
        questions = Questions(split_prompt(processor), config.image_token_id, layers)
        bench = Bench(model, processor, Counter(config, peak), peak, device, ends)
        print(describe(options, model, device, peak), end="\n\n")
        rows = measure_reference(bench, questions, options)
        engine = make_engine(model, directory)
        more, stage_rows = measure_engine(bench, engine, questions, options)
        if rows := [*rows, *more]:
            print_table(WAYS_HEADER, rows)
        if stage_rows:
            print("\nTime by stage; in brackets the share of it that the roofline explains:\n")
            print_table(STAGES_HEADER, stage_rows)
        if "invariance" in options.sections:
            measure_invariance(bench, engine, questions, options)
        if "small" in options.sections:
            measure_small(bench, options)
        if "busy" in options.sections:
            measure_busy(bench, engine, questions, options)
        if "sizes" in options.sections:
            if device.type == "cuda" and options.memory_cap is None:
                engine.free_cache()
                options.memory_cap = 24.0
                cap_memory(options.memory_cap, device)
                engine = make_engine(model, directory)  # whose bounds follow from it
            failed = measure_sizes(bench, engine, questions, options)
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())

"""Parts against the reference way: packing, size, reading one layer, the collector end to end, its memory.

The reference way is what the script that this project replaces does: `h5py.File(path, "w")` and
`create_dataset(compression="gzip", compression_opts=4)` for each vector. Its loader loops over files and keys. Vectors are
bfloat16 values with a mean and a scale for each dimension, and a few massive dimensions, as hidden states have. CPU time, but
for the cold reads. Each cell is measured in a process of its own.

    python benchmarks/storage_parts.py [--samples 1000] [--parts 10]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--without-isal" in sys.argv:
    sys.modules["isal"] = None  # type: ignore[assignment]

import h5py
import ml_dtypes
import numpy as np
from common import print_table

sys.path.insert(0, str(Path(__file__).parent.parent))
import storage
from storage.hdf5.part import write_part
from storage.question import Question
from storage.runs.pack import pack
from storage.sample import Sample
from tests.support.builders import make_facts, make_questions, make_run, make_settings

WIDTH, LAYERS, LAYER = 3584, (0, 7, 14, 21, 27), 21
VISION = ["vision_only_representation", *(f"vision_token_representation/layer_{k}" for k in LAYERS)]
QUERY = [f"query_token_representation/layer_{k}" for k in LAYERS]
FACTS: dict[str, Any] = {
    "seq_len": 423, "vision_token_position": 391, "query_token_position": 422, "image_grid_thw": [1, 34, 46],
    "num_vision_tokens": 391, "image_size": [640, 480], "resized_size": [644, 476], "image_sha256": "3b" * 32,
    "finish_reason": "eos", "num_answer_tokens": 12, "answer_token_ids": list(range(1000, 1012)),
    "answer_token_logprobs": [-0.125] * 12, "first_token_entropy": 0.75, "device": "cuda", "gpu": "NVIDIA H100",
    "attention_implementation": "sdpa", "library_versions": "torch 2.14.0, transformers 5.0.0",
}  # fmt: skip
Pairs = list[tuple[Question, Sample]]


def make_samples(number: int, per_image: int) -> Pairs:
    """Return questions with their samples; those of an image have equal vision vectors."""
    generator = np.random.default_rng(0)
    scales = np.exp(generator.normal(0, 0.5, (len(VISION + QUERY), WIDTH))).astype(np.float32)
    means = scales * generator.normal(0, 0.5, scales.shape).astype(np.float32)
    massive = generator.choice(WIDTH, 4, replace=False)
    means[:, massive] *= 500
    scales[:, massive] *= 50

    def vectors(rows: slice) -> Any:
        noise = generator.standard_normal(scales[rows].shape, dtype=np.float32)
        return (means[rows] + scales[rows] * noise).astype(ml_dtypes.bfloat16)

    pairs, image = [], ""
    for question in make_questions(number, per_image=per_image, extra={"category": "colour"}):
        if question.image_id != image:
            vision, image = vectors(slice(len(VISION))), question.image_id
        query = vectors(slice(len(VISION), None))
        named = dict(zip(VISION + QUERY, [*vision, *query], strict=True))
        pairs.append((question, Sample(named, "A red bus stands in front of a house.", FACTS)))
    return sorted(pairs, key=lambda pair: pair[0].question_id)


def write_reference(path: Path, pairs: Pairs) -> None:
    """Write a file as the reference script does."""
    with h5py.File(path, "w") as file:
        for question, sample in pairs:
            group = file.create_group(question.question_id)
            group.create_dataset("question", data=question.question)
            group.create_dataset("image_id", data=question.image_id)
            group.create_dataset("answer", data=sample.answer)
            group.create_dataset("ground_truth_answer", data=question.ground_truth_answer)
            for name, vector in sample.vectors.items():
                group.create_dataset(name, data=vector.astype(np.float32), compression="gzip", compression_opts=4)


def reference_loop(files: list[Path]) -> list[Any]:
    """Read one layer as the reference loader does."""
    vectors = []
    for path in files:
        with h5py.File(path, "r") as file:
            for key in file:
                vectors.append(file[key][f"query_token_representation/layer_{LAYER}"][:])
    return vectors


def load(files: list[Path]) -> Any:
    """Read one layer, with the frame of the questions."""
    return storage.load(files, "query_token_representation", LAYER)


def load_vectors(files: list[Path]) -> Any:
    """Read one layer and its ids alone: what the reference loader's loop reads."""
    return storage.load(files, "query_token_representation", LAYER, columns=[])


# Cells: each runs in a process of its own and returns numbers


def measure_packing(options: argparse.Namespace) -> dict[str, float]:
    """Return CPU milliseconds and kilobytes per sample."""
    pairs = make_samples(options.samples, options.per_image)
    path = options.scratch / f"{options.way}-{options.per_image}-{options.without_isal}.h5"
    if options.way == "reference":
        cpu = cpu_seconds(lambda: write_reference(path, pairs), before=lambda: path.unlink(missing_ok=True))
    else:
        run_settings, facts = make_settings(), make_facts(hidden_size=WIDTH, layers=LAYERS)
        cpu = cpu_seconds(
            lambda: write_part(path, run_settings, facts, 1, pairs, []), before=lambda: path.unlink(missing_ok=True)
        )
    return {"ms": 1e3 * cpu / options.samples, "kb": path.stat().st_size / 1e3 / options.samples}


def measure_reading(options: argparse.Namespace) -> dict[str, float]:
    """Return seconds for one layer of all parts: cold (wall time) and warm (CPU time)."""
    files = [options.scratch / f"{options.way}-{k}.h5" for k in range(options.parts)]
    if not all(path.exists() for path in files):
        pairs = make_samples(options.samples, 1) if options.way == "ours" else []
        for number, path in enumerate(files):
            if options.way == "ours":  # ids of its own in each part
                own = [
                    (replace(question, question_id=f"{number}-{question.question_id}"), sample) for question, sample in pairs
                ]
                write_part(path, make_settings(), make_facts(hidden_size=WIDTH, layers=LAYERS), number + 1, own, [])
            else:
                shutil.copyfile(options.scratch / f"{options.way}-1-False.h5", path)
            forget(path)
    work = {"load": load, "vectors": load_vectors, "loop": reference_loop}[options.reader]
    work(files[:1])  # imports
    cold = []
    for _ in range(2):
        for path in files:
            forget(path)
        begun = time.perf_counter()
        work(files)
        cold.append(time.perf_counter() - begun)
    return {"cold": min(cold), "warm": cpu_seconds(lambda: work(files))}


def measure_collector(options: argparse.Namespace) -> dict[str, float]:
    """Return samples per second of CPU and of wall time from staged files to published parts, and the peak memory."""
    directory = options.scratch / "run"
    pairs = make_samples(options.samples, options.per_image)
    questions = [question for question, _ in pairs]
    model = make_facts(hidden_size=WIDTH, layers=LAYERS)
    interval = options.samples // options.parts
    run = make_run(directory, questions, model=model, checkpoint_interval=interval)
    for number, (_, sample) in enumerate(pairs):
        run.stage_sample(number // interval + 1, number % interval, sample)
    try:
        return child("collect", scratch=options.scratch, isal=not options.without_isal)
    finally:
        shutil.rmtree(directory)


def measure_collect(options: argparse.Namespace) -> dict[str, float]:
    """Pack what `measure_collector` staged."""
    from storage.runs.run import Run

    run = Run.open(options.scratch / "run")
    size = sum(piece.size for piece in run.slices)
    wall, cpu = time.perf_counter(), time.process_time()
    for piece in run.slices:
        assert pack(run, piece.part)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    # Not ru_maxrss: a child starts with its parent's.
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    peak = int(line.split()[1]) / 1024
    return {"cpu": size / cpu, "wall": size / wall, "peak": peak}


def child(cell: str, *, isal: bool = True, **values: Any) -> dict[str, float]:
    """Measure a cell in a new process."""
    arguments = [str(x) for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v)]
    command = [sys.executable, __file__, "--cell", cell, *arguments, *(["--without-isal"] * (not isal))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def cpu_seconds(work: Callable[[], Any], *, before: Callable[[], Any] = lambda: None, repeats: int = 3) -> float:
    """Return the least CPU time of several runs: the one that other processes disturbed least."""
    times = []
    for _ in range(repeats):
        before()
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def questions(number: int) -> str:
    """Return a number of questions, in words."""
    return f"{number} question" + "s" * (number > 1)


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def tables(options: argparse.Namespace) -> list[list[str]]:
    """Measure every cell; return the table's rows."""

    def cell(name: str, **values: Any) -> dict[str, float]:
        return child(name, **({"samples": options.samples, "scratch": options.scratch} | values))

    rows = []
    for per_image in (1, 3):
        base = cell("packing", way="reference", per_image=per_image)
        for isal in (False, True):
            ours = cell("packing", way="ours", per_image=per_image, isal=isal)
            name = f"pack, {questions(per_image)} per image, {'isal' if isal else 'zlib'}"
            rows.append([f"{name}: CPU", f"{base['ms']:.2f} ms/sample", f"{ours['ms']:.2f} ms/sample",
                         f"{base['ms'] / ours['ms']:.1f}x less"])  # fmt: skip
            rows.append([f"{name}: size", f"{base['kb']:.1f} KB/sample", f"{ours['kb']:.1f} KB/sample",
                         f"{ours['kb'] / base['kb']:.2f}x"])  # fmt: skip
    reads = {
        key: cell("reading", way=key[0], reader=key[1], parts=options.parts)
        for key in [("reference", "loop"), ("ours", "loop"), ("ours", "load"), ("ours", "vectors")]
    }
    base = reads["reference", "loop"]
    number = f"{options.samples * options.parts:,} samples"
    titles = {
        "vectors": "storage.load of vectors and ids",
        "load": "storage.load with the frame too",
        "loop": "the reference loader's loop on our files",
    }
    for reader, title in titles.items():
        for state in ("cold", "warm"):
            ours = reads["ours", reader]
            rows.append([f"one layer of {number}, {title}: {state}", f"{base[state]:.2f} s",
                         f"{ours[state]:.2f} s", f"{base[state] / ours[state]:.1f}x faster"])  # fmt: skip
    for per_image in (1, 3):
        for isal in (False, True):
            ours = cell("collector", isal=isal, parts=1, per_image=per_image)
            rows.append([f"collector, {questions(per_image)} per image, {'isal' if isal else 'zlib'}", "",
                         f"{ours['cpu']:.0f} samples/s of CPU ({ours['wall']:.0f} of wall time)", ""])  # fmt: skip
    for parts in (1, 4, 8):
        ours = cell("collector", parts=parts, samples=options.samples * parts, per_image=1)
        rows.append([f"collector's peak memory, parts: {parts} of {options.samples:,}", "", f"{ours['peak']:.0f} MB", ""])
    return rows


def main() -> None:
    """Print the table; or, as a child, measure one cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000, help="samples in a part")
    parser.add_argument("--parts", type=int, default=10, help="parts that one layer is read of")
    for name, default in {"cell": "", "way": "ours", "reader": "load"}.items():
        parser.add_argument(f"--{name}", default=default, help=argparse.SUPPRESS)
    parser.add_argument("--per-image", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without-isal", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(globals()[f"measure_{options.cell}"](options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        print_table(["what", "reference way", "parts", "ratio"], tables(options))


if __name__ == "__main__":
    main()

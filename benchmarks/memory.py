"""Memory: of the engine against the batch size, and of a whole run, with its time, as the dataset grows tenfold.

Every cell is measured in processes of its own, by the kernel's high-water mark of resident memory (VmHWM). The engine's cells
take the 41 M-parameter model in float32 and one question an image, the case in which nothing is shared. The runs are those of
`producer run` on real JPEGs with a fake engine that answers at once: what is left is the plan, the queue, staging and packing.

    python benchmarks/memory.py [--batches 1 4 16 48] [--sizes 500 1500 5000]
    python benchmarks/memory.py --quick    # does it run?
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # shared cores: with a thread per core the same work took ten times longer

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import skimage.data
from common import print_table
from PIL import Image

from workers.demo.small_model import build_small_model
from workers.demo.small_spec import BENCH, TEST

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "grass", "moon")
QUESTIONS_PER_IMAGE = 5
MAX_PIXELS = 256 * 28 * 28
ANSWER_TOKENS = 32
ROLES = {  # of a run's processes, by a word of their command
    "collector": "collector@",
    "worker": "worker@",
    "engine": "workers.engine.process",
    "queue": "valkey",
}
SAMPLING = 0.1  # seconds between two looks at a run's processes


def make_images(directory: Path, number: int, size: tuple[int, int] = (320, 240)) -> list[Path]:
    """Write crops of photographs as JPEGs."""
    directory.mkdir()
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    paths = []
    for index in range(number):
        source = sources[index % len(sources)]
        shift = index // len(sources) % 64
        paths.append(directory / f"{index:05d}.jpg")
        source.crop((shift, shift, source.width, source.height)).resize(size).save(paths[-1])
    return paths


# --- the engine ------------------------------------------------------------------------------------------------------


def measure_engine(model: str, images: str, batch: int) -> None:
    """Run the engine over a directory of images in batches; print what it took as JSON. In a process of its own."""
    import torch

    from workers.checkpoint.identity import resolve_layers
    from workers.engine.interface import EngineSpec, Recipe
    from workers.engine.model import ModelEngine
    from workers.extract.preprocess import Preprocessor

    torch.set_num_threads(1)
    engine = ModelEngine(EngineSpec("model", model, "main", "float32", model))
    preprocess = Preprocessor(engine.info)
    recipe = Recipe(layers=resolve_layers(None, engine.info.num_hidden_layers), max_new_tokens=ANSWER_TOKENS)
    limits = (engine.info.min_pixels, MAX_PIXELS)
    requests = [
        preprocess.request([preprocess.image(p.name, p.parent, (), limits)], "What is in the image?", recipe)
        for p in sorted(Path(images).iterdir())
    ]
    loaded = _resident(os.getpid(), "VmRSS")
    begun = time.perf_counter()
    for start in range(0, len(requests), batch):
        engine.extract(requests[start : start + batch])
    seconds = time.perf_counter() - begun
    print(json.dumps({"loaded": loaded, "peak": _resident(os.getpid(), "VmHWM"), "rate": len(requests) / seconds}))


def engine_rows(scratch: Path, batches: list[int], number: int, *, quick: bool) -> list[list[str]]:
    """Measure the engine at each batch size; return the table's rows."""
    model = build_small_model(scratch / "model", TEST if quick else BENCH)
    size = (168, 112) if quick else (504, 392)  # 24 tokens, or 252
    make_images(scratch / "images", number, size)
    rows = []
    for batch in batches:
        call = [sys.executable, __file__, "--engine", str(model), str(scratch / "images"), str(batch)]
        found = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)
        grown = found["peak"] - found["loaded"]
        figures = [f"{value / 1e6:.0f}" for value in (found["loaded"], found["peak"], grown, grown / batch)]
        rows.append([str(batch), *figures, f"{found['rate']:.2f}"])
    return rows


# --- a whole run -----------------------------------------------------------------------------------------------------


def run_rows(scratch: Path, sizes: list[int]) -> list[list[str]]:
    """Measure runs over datasets of these sizes; return the table's rows."""
    model = build_small_model(scratch / "fake" / "model", TEST)
    images = make_images(scratch / "photographs", -(-max(sizes) // QUESTIONS_PER_IMAGE))
    rows: list[list[str]] = []
    before: tuple[int, float] | None = None
    for size in sizes:
        table = _write_table(scratch / f"{size}.csv", images, size)
        seconds, peaks = _run(table, images[0].parent, scratch / f"run-{size}", model, interval=max(10, min(100, size // 5)))
        slope = f"{(seconds - before[1]) / (size - before[0]) * 1e3:.1f}" if before else "–"
        before = size, seconds
        memory = [f"{peaks.get(role, 0) / 1e6:.0f}" for role in ("producer", *ROLES)]
        rows.append([f"{size:,}", f"{seconds:.1f}", slope, *memory])
    return rows


def _write_table(path: Path, images: list[Path], number: int) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image_id", "question", "answer"])
        for index in range(number):
            image = images[index // QUESTIONS_PER_IMAGE].name
            writer.writerow([f"q{index:06d}", image, f"What is number {index} in the image?", "nothing"])
    return path


def _run(table: Path, images: Path, output: Path, model: Path, interval: int) -> tuple[float, dict[str, int]]:
    """Do one run; return its seconds and each process's peak in bytes."""
    command = [
        str(Path(sys.executable).with_name("producer")), "run", str(table), "--images-dir", str(images),
        "--output-dir", str(output), "--model", str(model), "--checkpoint-interval", str(interval), "--quiet",
    ]  # fmt: skip
    own = {name: value for name, value in os.environ.items() if not name.startswith("HALP_")}
    begun = time.perf_counter()
    process = subprocess.Popen(command, env={**own, "HALP_ENGINE": "fake", "CUDA_VISIBLE_DEVICES": ""})
    peaks: dict[str, int] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - begun
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"the run over {table.name} ended with {code}")
    return seconds, peaks


def _watch(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    """Keep the largest high-water mark of each of a run's processes."""
    while not ended.wait(SAMPLING):
        try:
            family = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for one, role in [(pid, "producer"), *((child.pid, _role(child)) for child in family)]:
            if role:
                peaks[role] = max(peaks.get(role, 0), _resident(one, "VmHWM"))


def _role(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return next((role for role, word in ROLES.items() if word in command), "")


def _resident(pid: int, name: str) -> int:
    """Return a figure of /proc/PID/status in bytes; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 48], help="the engine's batch sizes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1500, 5000], help="questions of the runs")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it works")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        measure_engine(*options.engine[:2], int(options.engine[2]))
        return
    batches, sizes, number = ([1, 4], [20, 200], 4) if options.quick else (options.batches, options.sizes, 48)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        rows = engine_rows(scratch, batches, number, quick=options.quick)
        header = ("batch", "loaded, MB", "peak, MB", "grown, MB", "grown, MB/question", "samples/s")
        print(f"The engine over {number} images with one question each, {ANSWER_TOKENS} tokens at most:", end="\n\n")
        print_table(header, rows)
        rows = run_rows(scratch, sizes)
        header = (
            "questions",
            "run, s",
            "ms/question beyond the row above",
            *(f"{r}, MB" for r in ("producer", *ROLES)),
        )
        print("\nA whole run with a fake engine; each process's peak:", end="\n\n")
        print_table(header, rows)


if __name__ == "__main__":
    main()

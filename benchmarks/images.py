"""Images a second that one thread reads, decodes and resizes, as `prepare` does, by size and format.

The pictures are scikit-image's photograph of a cat, enlarged, with noise. `--other` names a tree of another commit, which is
measured in turn with this one, a round each: on a machine with other work one after the other would compare the work.

    python benchmarks/images.py [--rounds 6] [--other /path/to/another/tree]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage
from common import print_table
from PIL import Image

HERE = Path(__file__).parent.parent
SIZES = {"0.3": (640, 480), "2": (1632, 1224), "12": (4000, 3000)}
FORMATS = {
    "jpg": {"quality": 90}, "progressive.jpg": {"quality": 90, "progressive": True}, "png": {}, "webp": {"quality": 85},
    "tif": {}, "gif": {},
}  # fmt: skip
PROCESS = """
import json, sys, time
from workers.extract.loading import load_image
for line in sys.stdin:
    path, number = json.loads(line)
    times = []
    for _ in range(number + 1):
        begun = time.perf_counter()
        load_image(path, 28, (3136, 12845056))
        times.append(time.perf_counter() - begun)
    print(json.dumps(times[1:]), flush=True)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    arguments = parser.parse_args()
    trees = [HERE] if arguments.other is None else [arguments.other, HERE]
    processes = [_start(tree) for tree in trees]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for size in arguments.sizes:
            for name in FORMATS:
                path = _picture(Path(directory), size, name)
                times = _measure(processes, path, max(1, round(10 / float(size))), arguments.rounds)
                speeds = [f"{1 / statistics.median(one):.1f}" for one in times]
                best = [f"{min(one) * 1e3:.1f}" for one in times]
                rows.append([size, name, f"{path.stat().st_size / 1e6:.2f}", *speeds, *best])
                path.unlink()
    names = ["other", "here"][-len(trees) :]
    measures = [f"{name}, {what}" for what in ("images/s", "best ms") for name in names]
    print_table(["megapixels", "format", "MB", *measures], rows)
    for process in processes:
        process.kill()
        process.wait()


def _start(tree: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROCESS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _measure(processes: list[subprocess.Popen[str]], path: Path, number: int, rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in processes]
    for _ in range(rounds):
        for process, found in zip(processes, times):
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([str(path), number]), file=process.stdin, flush=True)
            found.extend(json.loads(process.stdout.readline()))
    return times


def _picture(directory: Path, size: str, name: str) -> Path:
    width, height = SIZES[size]
    cat = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB").resize((width, height))
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    path = directory / f"{size}.{name}"
    Image.fromarray((np.asarray(cat) + noise).clip(0, 255).astype(np.uint8)).save(path, **FORMATS[name])
    return path


if __name__ == "__main__":
    main()

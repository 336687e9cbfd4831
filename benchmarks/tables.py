"""Planning a run over a table that holds its images: time, and the most memory of the process that does it.

A Parquet file as the Hugging Face hub has them: each row with an image of its own, noise behind a JPEG's first bytes.

    python benchmarks/tables.py [--rows 100000] [--kilobytes 50]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_table

from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST

_GROUP = 100  # rows, as the hub's files have them
_PLAN = """
import json, resource, sys, time
from producer.options import run_options
from producer.planning import plan_run
begun = time.monotonic()
run = plan_run(run_options(__import__("pathlib").Path(sys.argv[1]), output_dir=sys.argv[2], model=sys.argv[3]))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.monotonic() - begun, "cpu": usage.ru_utime + usage.ru_stime, "kb": peak,
                  "questions": sum(piece.size for piece in run.slices)}))
"""


def write_table(path: Path, rows: int, size: int) -> None:
    """Write a Parquet file with an image of its own in each row."""
    random = np.random.default_rng(0)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("question_id", pa.int64()), ("image", image), ("question", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for begin in range(0, rows, _GROUP):
            cells = [
                {"question_id": n, "image": {"bytes": b"\xff\xd8\xff" + random.bytes(size), "path": f"{n}.jpg"},
                 "question": f"What is in picture {n}?", "answer": "noise"}
                for n in range(begin, min(rows, begin + _GROUP))
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(cells, schema))


def measure(scratch: Path, rows: int, kilobytes: int) -> None:
    """Print the table."""
    model, table = build_small_model(scratch / "Qwen2.5-VL-Small", TEST), scratch / "table.parquet"
    write_table(table, rows, kilobytes << 10)
    found = []
    for name in ("planned", "the same command again"):
        call = [sys.executable, "-c", _PLAN, str(table), str(scratch / "output"), str(model)]
        result = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        found.append([
            f"{rows:,} x {kilobytes} KB", name, f"{result['questions']:,}", f"{result['seconds']:.0f}", f"{result['cpu']:.0f}",
            f"{result['kb'] / 1024:.0f}",
        ])  # fmt: skip
    print_table(("rows", "", "questions", "s", "CPU, s", "peak, MB"), found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kilobytes", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch), options.rows, options.kilobytes)


if __name__ == "__main__":
    main()

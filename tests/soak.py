"""The soak: what `test_chaos.py` does, longer and against two servers; and memory over a long run. Prints Markdown tables.

`make soak` runs it all, an hour or two on two cores. Exit code 1 where something was lost, came twice, or grew.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tests.support.chaos import REDIS, VALKEY, Chaos, Force, Member, Server
from tests.support.expectations import assert_whole, files_below, make_dataset
from tests.support.processes import command
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST

MIN_KILLS = 66
GROWTH = 1.1, 8  # a process may grow by a tenth and 8 MB from a third of the run on
ROLES = ("worker", "engine", "collector", "server")
SERVERS = {"valkey": VALKEY, "redis": REDIS}


def fire(model: Path, seeds: list[int], servers: list[str], questions: int) -> None:
    """Run under fire, once for each seed and server."""
    force = Force(questions=questions, kills=12, rounds=4, freeze=20.0, neighbours=True, timeout=3600.0)
    print("\n| server | seed | kills | at named points | workers, engines, collectors, servers | other events | seconds |")
    print("|---|--:|--:|--:|---|---|--:|", flush=True)
    for name in servers:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                chaos = Chaos(Path(folder), model, seed, SERVERS[name], force)
                tally = chaos.run()
                assert_whole(chaos.output, chaos.data)
            kills = tally.kills
            assert kills.total() >= MIN_KILLS, tally
            points = sum(number for point, number in kills.items() if "." in point)
            roles = ", ".join(str(kills[role]) for role in ("worker", "engine", "collector", "server"))
            events = "; ".join(f"{number} {event}" for event, number in sorted(tally.events.items()))
            print(f"| {version(SERVERS[name])} | {seed} | {kills.total()} | {points} | {roles} | {events} "
                  f"| {tally.seconds:.0f} |", flush=True)  # fmt: skip
    print(f"\nEach: {questions:,} questions, 5 % of them failing for good and 5 % at first, through 2 workers and 2 "
          "collectors; afterwards every question once, with its values or its reason, nothing left behind, and "
          "`storage verify --deep` without a finding.")  # fmt: skip


def version(binary: str) -> str:
    """Return a server's name and version."""
    words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"{words[0]} {words[2].removeprefix('v=')}"


def watch_memory(model: Path, questions: int, workers: int) -> bool:
    """Run many questions through many workers; print the memory of each kind of process; tell whether it stays flat."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        data = make_dataset(directory, questions, random.Random(0))
        (directory / "server").mkdir()
        (directory / "flaky").mkdir()
        server = Server(VALKEY, directory / "server")
        variables = {
            "HALP_BROKER_URL": server.url, "HALP_DATA_ROOTS": folder, "HALP_MODEL": str(model), "HALP_ENGINE": "fake",
            "HALP_SWEEP_INTERVAL": "1", "SABOTAGE_FLAKY": str(directory / "flaky"),
        }  # fmt: skip
        members = [Member(directory, "extract", n, variables, ()) for n in range(workers)]
        members.append(Member(directory, "collect", 0, variables, ()))
        server.start()
        try:
            output = directory / "output"
            options = ("--images-dir", data.images, "--output-dir", output, "--model", model)
            enqueued = command("producer", "enqueue", data.table, *options, timeout=600, **variables)
            assert enqueued.returncode == 0, enqueued.stderr
            for member in members:
                member.start()
            memory = sample_memory(output, questions, members, server)
        finally:
            for member in members:
                if member.process is not None:
                    member.process.kill()
                    member.process.wait()
            server.kill()
        flat = judge_memory(memory, questions)
        assert_whole(output, data)
    return flat


Memory = dict[int, tuple[float, dict[str, dict[int, float]]]]  # tenth: seconds, role to process to MB


def sample_memory(output: Path, questions: int, members: list[Member], server: Server) -> Memory:
    """Return the resident memory of every process at each tenth of the run; print the largest of each role."""
    found: Memory = {}
    print(f"\n| questions | seconds | {' | '.join(f'{name}, MB' for name in ROLES)} |")
    print(f"|--:|--:|{'--:|' * len(ROLES)}", flush=True)
    begun = time.monotonic()
    tenth = 0
    while tenth < 10:
        time.sleep(1)
        finished = (output / ".run" / "summary.json").exists()
        tenth = 10 if finished else min(9, 10 * done(output) // questions)
        if tenth == 0 or tenth in found:
            continue
        roles: dict[str, dict[int, float]] = defaultdict(dict)
        assert server.process is not None
        roles["server"][server.process.pid] = resident(server.process.pid)
        for member in members:
            assert member.process is not None and member.process.poll() is None, member.log.read_text()[-3000:]
            roles["worker" if member.kind == "extract" else "collector"][member.pid] = resident(member.pid)
            if engine := member.engine():
                roles["engine"][engine.pid] = resident(engine.pid)
        found[tenth] = time.monotonic() - begun, roles
        sizes = " | ".join(f"{max(roles[name].values(), default=0):.0f}" for name in ROLES)
        print(f"| {questions * tenth // 10:,} | {found[tenth][0]:.0f} | {sizes} |", flush=True)
    return found


def done(output: Path) -> int:
    """Return how many questions are finished, about."""
    parts = len(list((output / ".run" / "parts").glob("*.json")))
    return parts * 1000 + len(files_below(output / ".run" / "staging"))


def resident(process: int) -> float:
    """Return a process's resident memory in MB."""
    return float(psutil.Process(process).memory_info().rss) / 2**20


def judge_memory(memory: Memory, questions: int) -> bool:
    """Print and tell whether every process stayed flat."""
    early = min(tenth for tenth in memory if tenth >= 3)
    last = max(memory)
    flat = True
    for name in ROLES:
        for process, size in memory[last][1][name].items():
            before = memory[early][1][name].get(process, size)
            if size > before * GROWTH[0] + GROWTH[1]:
                print(f"{name} {process} grew from {before:.0f} to {size:.0f} MB", file=sys.stderr)
                flat = False
    workers = len(memory[last][1]["worker"])
    print(f"\nThe largest process of each kind. {questions:,} questions, 5 % of them failing for good and 5 % at first, "
          f"{workers} workers, 1 collector, the default queue; every value and reason is checked afterwards. "
          f"{'Flat' if flat else 'NOT flat'}, by a bound of a tenth and 8 MB after {10 * early} % of them.")  # fmt: skip
    return flat


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("fire", "memory"), help="one part of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--servers", choices=list(SERVERS), nargs="+", default=list(SERVERS))
    parser.add_argument("--fire-questions", type=int, default=8000)
    parser.add_argument("--memory-questions", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    print(f"{os.cpu_count()} x {cpu}, {datetime.now(UTC):%Y-%m-%d}, `python -m tests.soak {shlex.join(sys.argv[1:])}`")
    with tempfile.TemporaryDirectory() as folder:
        model = build_small_model(Path(folder) / "Qwen2.5-VL-Test", TEST)
        if arguments.only != "memory":
            fire(model, arguments.seeds, arguments.servers, arguments.fire_questions)
        flat = arguments.only == "fire" or watch_memory(model, arguments.memory_questions, arguments.workers)
    raise SystemExit(0 if flat else 1)


if __name__ == "__main__":
    main()

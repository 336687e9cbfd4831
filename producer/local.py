"""A whole run on this machine: an embedded server, one worker per GPU, the collector, supervised until every part is there."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from producer.server import EmbeddedServer
from storage.account import Account, Bookkeeper
from storage.errors import UserError
from storage.location import is_url
from storage.run import Run
from workers.parent import PARENT_VARIABLE

_POLL, _REMOTE_POLL = 0.3, 3.0  # seconds between two accounts: in an object store each request is paid for
_GRACE = 20.0  # seconds that a worker has to finish its batch when it is asked to end
_MAX_DEATHS = 3  # of one process without a finished question in between


class RunStoppedError(Exception):
    """The run cannot go on by itself; what is finished is kept, and the same command resumes."""


def run_locally(run: Run, *, cache_dir: Path, show: Callable[[Account], None]) -> Account:
    """Compute a run with everything that it needs on this machine; `show` is called with the account as it grows.

    Raises UserError where the model cannot be loaded or another `run` works on the directory, RunStoppedError where a
    process keeps dying, KeyboardInterrupt, also for `producer cancel`. No process is left behind in any case, even after
    SIGKILL of this one.
    """
    with ExitStack() as stack:
        stack.enter_context(_only_one(run))
        if run.is_finished():
            return Bookkeeper(run).account()
        for worker in run.refusals():  # of an earlier call; those of this one are written anew
            run.withdraw_refusal(worker)
        run.withdraw_cancellation()
        server = stack.enter_context(EmbeddedServer())
        environment = {
            **os.environ,
            "HALP_BROKER_URL": server.url,
            "HALP_DATA_ROOTS": run.location,
            "HALP_SWEEP_INTERVAL": "1",
            "HALP_MODEL": run.settings.model,
            "HALP_REVISION": run.settings.revision,
            "HALP_DTYPE": run.settings.dtype,
            "HALP_CACHE_DIR": str(cache_dir),
            PARENT_VARIABLE: str(os.getpid()),
        }
        os.environ |= {name: environment[name] for name in ("HALP_BROKER_URL", "HALP_DATA_ROOTS")}
        logs = _local_state(run) / "logs"
        logs.mkdir(exist_ok=True)
        processes = [_Child("collector", ["collect", "--name", "collector"], environment, logs)]
        for gpu in gpus():
            name = "worker" if gpu is None else f"worker-gpu{gpu}"
            own = environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu}
            processes.append(_Child(name, ["extract", "--name", name], own, logs))
        stack.callback(_end, processes)
        for process in processes:
            process.start()
        return _supervise(run, processes, show)


def gpus() -> list[str | None]:
    """Return the GPUs to start a worker on, as CUDA names them; one None where there is none and the CPU computes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [name.strip() for name in visible.split(",") if name.strip()]
        return [*chosen] or [None]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [None]
    return [*listing.stdout.split()] or [None]


class _Child:
    """One supervised `workers` process with its log file."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], logs: Path) -> None:
        self.name = name
        self.deaths = 0
        self._command = [sys.executable, "-m", "workers.cli", *arguments]
        self._environment = environment
        self.log = logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                start_new_session=True,  # Ctrl-C is for the supervisor, which then ends them in order
            )  # fmt: skip

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def ask_to_end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, deadline: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """Return the end of the log: the reason that a process ended with."""
        lines = self.log.read_text(errors="replace").splitlines()
        critical = [i for i, line in enumerate(lines) if "CRITICAL" in line]
        return "\n".join(lines[critical[-1] :][:20] if critical else lines[-20:])


def _supervise(run: Run, processes: list[_Child], show: Callable[[Account], None]) -> Account:
    from workers.feed import wipe

    bookkeeper = Bookkeeper(run)
    begun = bookkeeper.account()
    done_before = _done(begun)
    done = done_before
    while True:
        account = bookkeeper.account()
        show(account)
        if run.is_finished():
            return account
        if run.is_cancelled():
            raise KeyboardInterrupt
        if _done(account) != done:  # less, where a retry plans failed questions again
            done = _done(account)
            for process in processes:
                process.deaths = 0
        if refusals := run.refusals():
            raise UserError("; ".join(refusals.values()))
        for process in processes:
            code = process.exit_code()
            if code is None:
                continue
            process.deaths += 1
            if code == 1 and done == done_before and process.name != "collector":
                raise UserError(f"the worker cannot work:\n{process.last_words()}\nFull log: {process.log}")
            if process.deaths >= _MAX_DEATHS:
                raise RunStoppedError(
                    f"{process.name} ended {process.deaths} times without finishing a question, last with {code}:\n"
                    f"{process.last_words()}\nFull log: {process.log}"
                )
            process.start()
            wipe(run)  # what the dead worker had taken would come back only after the visibility timeout
        time.sleep(_REMOTE_POLL if is_url(run.location) else _POLL)


def _done(account: Account) -> int:
    return account.written + account.failed + account.staged


def _end(processes: list[_Child]) -> None:
    for process in processes:
        process.ask_to_end()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.end(deadline)


@contextmanager
def _only_one(run: Run) -> Iterator[None]:
    """Hold the run's lock on this machine, which the kernel releases with this process."""
    with (_local_state(run) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `producer run` is at work on {run.location}: wait for it, or stop it") from None
        yield


def _local_state(run: Run) -> Path:
    """Return the directory for what only this machine needs of a run: its lock and its logs."""
    if not is_url(run.location):
        return run.output_dir / ".run"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    directory = state / "halp-extractor" / run.run_id
    directory.mkdir(parents=True, exist_ok=True)
    return directory

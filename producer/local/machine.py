"""A whole run on this machine: an embedded server, one worker per GPU, the collector, supervised until every part is there.

Where several machines share a run, each does this, and one of them has the server and the collector for all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from producer.local.server import EmbeddedServer
from producer.local.sharing import SharedServer
from producer.local_state import LOCK, local_state
from producer.resuming import Resumption
from storage.errors import UserError
from storage.naming import model_slug
from storage.runs.account import Account, Bookkeeper
from storage.runs.run import Run
from storage.runs.soundness import check_private_files
from storage.screen.terminal import echo
from storage.stores.location import is_url, join_roots
from workers.checkpoint.hub import cache_of
from workers.process.children import Child, on_gpu
from workers.process.gpus import visible_gpus
from workers.settings import settings

_POLL, _REMOTE_POLL = 0.3, 3.0  # seconds between two accounts: of an object store, or of many machines, each request costs
_GRACE = 20.0  # seconds that a worker has to finish its batch when it is asked to end
_SHARED_GRACE = 300.0  # where the run is shared: a cluster has a limit of its own
_SETTLED = 60.0  # seconds of life after which a death is the first in a row again, where progress may be that of others
_REPORT_GRACE = 150.0  # that the collector has to write the report of the finished run
_SILENCE = 10.0  # seconds without a finished question after which the run's files are looked at
_LOOKED_AT = 20  # slices of the plan that are next
_NOLOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # NFS without a lock manager, Lustre without `-o flock`
_MAX_DEATHS = 3  # of one process without a finished question in between


class RunStoppedError(Exception):
    """The run cannot go on by itself; what is finished is kept, and the same command resumes."""


def run_locally(
    run: Run,
    resumption: Resumption,
    *,
    model: str,
    cache_dir: Path | None,
    show: Callable[[Account], None],
    share: bool = False,
) -> Account:
    """Compute a run with everything that it needs on this machine; `show` is called with the account as it grows.

    model: the run's, where it lies now.
    share: with others that do the same.

    Raises UserError where the model cannot be loaded or another `run` works on the directory, DamagedError where a file is
    damaged that the run goes by, RunStoppedError where a process keeps dying, KeyboardInterrupt, also for `producer cancel`.
    No process is left behind in any case, even after SIGKILL of this one.
    """
    with ExitStack() as stack:
        stack.enter_context(_alone(run, share=share))
        if run.is_finished():
            return Bookkeeper(run).account()
        check_private_files(run)
        for worker in run.refusals() if not share else ():  # of an earlier call; those of this one are written anew
            run.withdraw_refusal(worker)
        if not resumption.take_back(run):
            raise KeyboardInterrupt
        shared = stack.enter_context(SharedServer(run)) if share else None
        server = shared or stack.enter_context(EmbeddedServer())
        os.environ.pop("HALP_BROKER_URL_FILE", None)  # it would be taken before the other
        os.environ |= {**server.variables, "HALP_DATA_ROOTS": join_roots([run.location])}
        environment = {
            **os.environ,
            "HALP_SWEEP_INTERVAL": "1",
            "HALP_MODEL": _model(model, run.settings.model_slug, server.directory),
            "HALP_REVISION": run.settings.revision,
            "HALP_DTYPE": run.settings.dtype,
            "HALP_CACHE_DIR": cache_of(model, run.settings.revision, cache_dir),
        }
        settings.cache_clear()  # the plan may have asked for them, and had the broker of before
        logs = local_state(run) / "logs"
        logs.mkdir(exist_ok=True)
        # Several of these may be at work on one machine too: two tasks of a cluster, each with a GPU that it calls 0.
        tail = f"-{socket.gethostname()}-{os.getpid()}" if shared else ""
        processes = [_Logged(f"collector{tail}", "collect", environment, logs)]
        workers = {on_gpu("worker", gpu): {"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus()} or {"worker": {}}
        for name, gpu in workers.items():
            processes.append(_Logged(f"{name}{tail}", "extract", environment | gpu, logs))
        stack.callback(_end, processes, _SHARED_GRACE if shared else _GRACE)
        return _supervise(run, processes, show, shared)


def _model(model: str, slug: str, directory: Path) -> str:
    """Return a name of the run's model by which a worker serves its queues: they are called after the name that was given."""
    if model_slug(model) == slug or not Path(model).is_dir():
        return model
    link = directory / slug  # it was given through a link, as was this one
    link.symlink_to(model)
    return str(link)


class _Logged(Child):
    """A supervised process with its log file."""

    def __init__(self, name: str, command: str, environment: Mapping[str, str], logs: Path) -> None:
        super().__init__(name, [command, "--name", name], environment)
        self.log = logs / f"{name}.log"
        self.begun = 0.0

    def start_logged(self) -> None:
        self.begun = time.monotonic()
        with self.log.open("ab") as log:
            self.start(log)

    def last_words(self) -> str:
        """Return the end of the log: the reason that a process ended with."""
        lines = self.log.read_text(errors="replace").splitlines()
        critical = [i for i, line in enumerate(lines) if "CRITICAL" in line]
        return "\n".join(lines[critical[-1] :][:20] if critical else lines[-20:])


def _supervise(run: Run, processes: list[_Logged], show: Callable[[Account], None], shared: SharedServer | None) -> Account:
    from workers.queue.feed import wipe

    collector, *workers = processes
    for process in workers if shared else processes:
        process.start_logged()
    bookkeeper = Bookkeeper(run)
    begun = bookkeeper.account()
    done_before = _done(begun)
    done, look_at = done_before, time.monotonic() + _SILENCE
    while True:
        account = bookkeeper.account()
        show(account)
        if run.is_finished():
            _end([collector], _REPORT_GRACE)
            return account
        if run.is_cancelled():
            raise KeyboardInterrupt
        if shared:
            _collect_if(collector, shared.look())
        if time.monotonic() > look_at:  # nothing is finished: is it the workers' doing?
            check_private_files(run, _LOOKED_AT)
            look_at = time.monotonic() + _SILENCE
        if _done(account) != done:  # less, where a retry plans failed questions again
            done, look_at = _done(account), time.monotonic() + _SILENCE
            for process in processes if not shared else ():
                process.deaths = 0
        if refusals := _refusals(run, workers, shared):
            raise UserError("; ".join(refusals))
        for process in processes:
            code = process.exit_code()
            if code is None:
                continue
            process.deaths = 1 if shared and time.monotonic() - process.begun > _SETTLED else process.deaths + 1
            _refuse_dead(process, code, first=done == done_before and process is not collector)
            process.start_logged()
            if not shared:
                wipe(run)  # what the dead worker had taken would come back only after the visibility timeout
        time.sleep(_REMOTE_POLL if shared or is_url(run.location) else _POLL)


def _refuse_dead(process: _Logged, code: int, *, first: bool) -> None:
    """Raise where a process that ended cannot work; `first`: it is a worker, and nothing has been finished yet."""
    if code == 1 and first:
        raise UserError(f"the worker cannot work:\n{process.last_words()}\nFull log: {process.log}")
    if process.deaths >= _MAX_DEATHS:
        raise RunStoppedError(
            f"{process.name} ended {process.deaths} times without finishing a question, last with {code}:\n"
            f"{process.last_words()}\nFull log: {process.log}"
        )


def _collect_if(collector: _Logged, leads: bool) -> None:
    """Have the collector run where the server is, and nowhere else."""
    if leads and not collector.begun:
        collector.start_logged()
    elif collector.begun and not leads:
        _end([collector])
        collector.forget()
        collector.begun = 0.0


def _refusals(run: Run, workers: list[_Logged], shared: SharedServer | None) -> list[str]:
    """Return why workers refuse the run; of a run that is shared, those of this machine: others may have the right model."""
    ours = {f"{worker.name}@{socket.gethostname()}" for worker in workers}
    return [why for worker, why in run.refusals().items() if shared is None or worker in ours]


def _done(account: Account) -> int:
    return account.written + account.failed + account.staged


def _end(processes: list[_Logged], grace: float = _GRACE) -> None:
    for process in processes:
        process.ask_to_end()
    deadline = time.monotonic() + grace
    for process in processes:
        process.end(deadline)


@contextmanager
def _alone(run: Run, *, share: bool) -> Iterator[None]:
    """Hold the run's lock, alone or with those who share it; the kernel releases it with this process."""
    state = local_state(run)
    state.mkdir(parents=True, exist_ok=True)
    with (state / LOCK).open("a+") as file:  # over NFS, a lock that is shared wants a file that can be read
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `producer run` is at work on {run.location}: wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in _NOLOCKS:
                raise
            reason = os.strerror(error.errno)
            echo(f"{run.location} has no file locks ({reason}): a second `producer run` on it goes unnoticed", err=True)
        yield

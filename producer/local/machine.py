"""A whole run on this machine: an embedded server, one worker per GPU, the collector, supervised until every part is there."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from producer.local.server import EmbeddedServer
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

_POLL, _REMOTE_POLL = 0.3, 3.0  # seconds between two accounts: in an object store each request is paid for
_GRACE = 20.0  # seconds that a worker has to finish its batch when it is asked to end
_REPORT_GRACE = 150.0  # that the collector has to write the report of the finished run
_SILENCE = 10.0  # seconds without a finished question after which the run's files are looked at
_LOOKED_AT = 20  # slices of the plan that are next
_NOLOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # NFS without a lock manager, Lustre without `-o flock`
_MAX_DEATHS = 3  # of one process without a finished question in between


class RunStoppedError(Exception):
    """The run cannot go on by itself; what is finished is kept, and the same command resumes."""


def run_locally(
    run: Run, resumption: Resumption, *, model: str, cache_dir: Path | None, show: Callable[[Account], None]
) -> Account:
    """Compute a run with everything that it needs on this machine; `show` is called with the account as it grows.

    model: the run's, where it lies now.

    Raises UserError where the model cannot be loaded or another `run` works on the directory, DamagedError where a file is
    damaged that the run goes by, RunStoppedError where a process keeps dying, KeyboardInterrupt, also for `producer cancel`.
    No process is left behind in any case, even after SIGKILL of this one.
    """
    with ExitStack() as stack:
        stack.enter_context(_only_one(run))
        if run.is_finished():
            return Bookkeeper(run).account()
        check_private_files(run)
        for worker in run.refusals():  # of an earlier call; those of this one are written anew
            run.withdraw_refusal(worker)
        if not resumption.take_back(run):
            raise KeyboardInterrupt
        server = stack.enter_context(EmbeddedServer())
        environment = {
            **os.environ,
            "HALP_BROKER_URL": server.url,
            "HALP_DATA_ROOTS": join_roots([run.location]),
            "HALP_SWEEP_INTERVAL": "1",
            "HALP_MODEL": _model(model, run.settings.model_slug, server.directory),
            "HALP_REVISION": run.settings.revision,
            "HALP_DTYPE": run.settings.dtype,
            "HALP_CACHE_DIR": cache_of(model, run.settings.revision, cache_dir),
        }
        os.environ |= {name: environment[name] for name in ("HALP_BROKER_URL", "HALP_DATA_ROOTS")}
        settings.cache_clear()  # the plan may have asked for them, and had the broker of before
        logs = local_state(run) / "logs"
        logs.mkdir(exist_ok=True)
        processes = [_Logged("collector", ["collect", "--name", "collector"], environment, logs)]
        workers = {on_gpu("worker", gpu): {"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus()} or {"worker": {}}
        for name, own in workers.items():
            processes.append(_Logged(name, ["extract", "--name", name], environment | own, logs))
        stack.callback(_end, processes)
        for process in processes:
            process.start_logged()
        return _supervise(run, processes, show)


def _model(model: str, slug: str, directory: Path) -> str:
    """Return a name of the run's model by which a worker serves its queues: they are called after the name that was given."""
    if model_slug(model) == slug or not Path(model).is_dir():
        return model
    link = directory / slug  # it was given through a link, as was this one
    link.symlink_to(model)
    return str(link)


class _Logged(Child):
    """A supervised process with its log file."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str], logs: Path) -> None:
        super().__init__(name, arguments, environment)
        self.log = logs / f"{name}.log"

    def start_logged(self) -> None:
        with self.log.open("ab") as log:
            self.start(log)

    def last_words(self) -> str:
        """Return the end of the log: the reason that a process ended with."""
        lines = self.log.read_text(errors="replace").splitlines()
        critical = [i for i, line in enumerate(lines) if "CRITICAL" in line]
        return "\n".join(lines[critical[-1] :][:20] if critical else lines[-20:])


def _supervise(run: Run, processes: list[_Logged], show: Callable[[Account], None]) -> Account:
    from workers.queue.feed import wipe

    bookkeeper = Bookkeeper(run)
    begun = bookkeeper.account()
    done_before = _done(begun)
    done, look_at = done_before, time.monotonic() + _SILENCE
    while True:
        account = bookkeeper.account()
        show(account)
        if run.is_finished():
            _end(processes[:1], _REPORT_GRACE)  # the collector
            return account
        if run.is_cancelled():
            raise KeyboardInterrupt
        if time.monotonic() > look_at:  # nothing is finished: is it the workers' doing?
            check_private_files(run, _LOOKED_AT)
            look_at = time.monotonic() + _SILENCE
        if _done(account) != done:  # less, where a retry plans failed questions again
            done, look_at = _done(account), time.monotonic() + _SILENCE
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
            process.start_logged()
            wipe(run)  # what the dead worker had taken would come back only after the visibility timeout
        time.sleep(_REMOTE_POLL if is_url(run.location) else _POLL)


def _done(account: Account) -> int:
    return account.written + account.failed + account.staged


def _end(processes: list[_Logged], grace: float = _GRACE) -> None:
    for process in processes:
        process.ask_to_end()
    deadline = time.monotonic() + grace
    for process in processes:
        process.end(deadline)


@contextmanager
def _only_one(run: Run) -> Iterator[None]:
    """Hold the run's lock on this machine, which the kernel releases with this process."""
    state = local_state(run)
    state.mkdir(parents=True, exist_ok=True)
    with (state / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `producer run` is at work on {run.location}: wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in _NOLOCKS:
                raise
            reason = os.strerror(error.errno)
            echo(f"{run.location} has no file locks ({reason}): a second `producer run` on it goes unnoticed", err=True)
        yield

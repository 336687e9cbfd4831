"""The engine in a process of its own.

The decode loop never shares an interpreter with the task threads, and a native crash, a hang or a sticky CUDA error costs
this process only. The two ends talk over a socket pair in pickles: both are ours, and nothing from outside travels there but
pixels, which go through memory that both map.

The child imports this module and calls `main`. `python -m` would pickle its answers as classes of `__main__`, which the
parent would look for in its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from storage.errors import UserError
from storage.sample import Sample
from storage.screen.terminal import guard_logs
from workers.checkpoint.identity import local_directory
from workers.engine.interface import Engine, EngineSpec, ModelInfo, Request
from workers.engine.memory_errors import is_out_of_memory
from workers.engine.pixel_memory import PixelMemory, Sent
from workers.engine.prompt import PromptParts, PromptStyle
from workers.errors import BatchFailedError, EngineDiedError, EngineStartError, RunRefusedError, in_a_line
from workers.process.parent import die_with_parent

logger = logging.getLogger(__name__)
_CHILD = "from workers.engine.process import main; main()"
_EXIT_TIMEOUT = 5.0  # for a process that ends by itself to become an exit code


@dataclass(frozen=True, slots=True)
class _BatchError:
    """What the child answers in place of samples."""

    summary: str
    traceback: str
    out_of_memory: bool = False


class EngineProcess:
    """The parent's end. One question at a time: after `start` the batcher's thread asks, and seldom one that opens a run."""

    def __init__(self, spec: EngineSpec, step_timeout: float, load_timeout: float = 3600.0) -> None:
        self._spec = spec
        self._timeout = step_timeout
        self._load_timeout = load_timeout
        self.loading_since: float | None = None  # on the wall clock, as the next two: another process reads them
        self.busy_since: float | None = None
        self.answered: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._turn = threading.Lock()
        self._pixels = PixelMemory()

    def start(self) -> ModelInfo:
        """Start the process and wait until the model is loaded. Raises EngineStartError."""
        self.loading_since = time.time()
        try:
            return self._start()
        finally:
            self.loading_since = None

    def _start(self) -> ModelInfo:
        ours, theirs = socket.socketpair()
        # Celery sets a default timeout for all sockets while it shuts down, which makes these non-blocking: the child that is
        # started while a worker drains would take an empty socket for a closed one.
        ours.setblocking(True)
        theirs.setblocking(True)
        # A batch is larger than the socket's buffer: a stopped child would block `send` for ever.
        whole, fraction = divmod(self._timeout, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(fraction * 1e6)))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno()), str(self._pixels.descriptor), str(os.getpid())],
                pass_fds=[theirs.fileno(), self._pixels.descriptor],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.send(self._spec)
            if not self._connection.poll(self._load_timeout):
                self.stop()
                raise EngineStartError(f"{self._spec.model} was not loaded after {self._load_timeout:g} s (HALP_LOAD_TIMEOUT)")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineStartError(
                f"the engine's process ended with {self._ended()} while it loaded {self._spec.model}"
            ) from error
        if isinstance(answer, _BatchError):
            self.stop()
            if answer.traceback:
                logger.error("the engine could not be loaded:\n%s", answer.traceback)
            raise EngineStartError(f"cannot load {self._spec.model}: {answer.summary}")
        assert isinstance(answer, ModelInfo)
        return answer

    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Run one batch. Raises BatchFailedError; EngineDiedError, after which `start` makes a new process."""
        with self._turn:
            try:
                question = self._pixels.put(requests)
            except OSError as error:
                raise BatchFailedError(f"no memory for the images ({error.strerror})", "", out_of_memory=True) from error
            try:
                answer = self._answer(question)
            finally:
                self._pixels.clear()
        self.answered = time.time()
        if isinstance(answer, _BatchError):
            raise BatchFailedError(answer.summary, answer.traceback, out_of_memory=answer.out_of_memory)
        return list(answer)

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Have a run's prompt rendered and cut. Raises RunRefusedError where its template cannot be used; EngineDiedError."""
        with self._turn:
            answer = self._answer(style)
        if isinstance(answer, _BatchError):
            raise RunRefusedError(f"the run's chat template or system prompt cannot be used: {answer.summary}")
        assert isinstance(answer, PromptParts)
        return answer

    def _answer(self, question: Any) -> Any:
        if self._connection is None:
            self.start()
        connection = self._connection
        assert connection is not None
        self.busy_since = time.time()
        try:
            connection.send(question)
            if not connection.poll(self._timeout):
                raise TimeoutError
            return connection.recv()
        except (TimeoutError, BlockingIOError) as error:
            self.stop()
            raise EngineDiedError(f"the engine gave no answer for {self._timeout:g} s and was stopped") from error
        except (EOFError, OSError) as error:
            raise EngineDiedError(f"the engine's process ended with {self._ended()}") from error
        finally:
            self.busy_since = None

    def stop(self) -> int | None:
        """End the process at once; return its exit code."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return None
        self._process.kill()
        code = self._process.wait()
        self._process = None
        return code

    def _ended(self) -> str:
        """Describe how a process ended that closed its end. Killed too early, it would seem to have died of SIGKILL."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_TIMEOUT)
        return _describe(self.stop())

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid if self._process is not None else None


def make_engine(spec: EngineSpec) -> Engine:
    """Load an engine in this process."""
    if spec.kind.startswith("fake"):
        from workers.engine.fake import FakeEngine

        return FakeEngine(spec)
    local_directory(spec.model)  # transformers would take a directory that is not there for an ill-formed hub name
    from workers.engine.model import ModelEngine

    return ModelEngine(spec)


def _serve(connection: Connection, pixels: PixelMemory) -> None:
    try:
        engine = make_engine(connection.recv())
    except Exception as error:  # noqa: BLE001  (whatever a checkpoint or driver raises is why the worker exits)
        connection.send(_error(error))
        return
    connection.send(engine.info)
    while True:
        try:
            question = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = engine.extract(pixels.take(question)) if isinstance(question, Sent) else engine.prompt(question)
        except Exception as error:  # the batch boundary: the parent finds the one to blame
            if _is_sticky(error):
                raise
            answer = _error(error)
        if isinstance(answer, _BatchError) and answer.out_of_memory:
            engine.free_cache()  # here, not above: until the handler ends, the traceback holds on to the tensors
        connection.send(answer)


def _is_sticky(error: Exception) -> bool:
    """Tell whether the device refuses every call from here on, as after a fault; it is not so when memory ran out."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error:" in str(error)


def _error(error: Exception) -> _BatchError:
    if isinstance(error, (EngineStartError, UserError)):  # ours say it all
        return _BatchError(str(error), "")
    return _BatchError(in_a_line(error), traceback.format_exc(), is_out_of_memory(error))


def _describe(code: int | None) -> str:
    if code is None:
        return "an unknown exit code"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Serve the parent until it closes its end or dies."""
    descriptor, pixels, parent = map(int, sys.argv[1:4])
    die_with_parent(parent)
    guard_logs()  # a checkpoint's own words are in transformers' warnings
    # Batches differ in size, and the allocator's fixed segments would leave holes: a 24 GB card needs them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _serve(Connection(descriptor), PixelMemory(pixels))

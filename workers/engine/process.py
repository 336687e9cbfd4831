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
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
BATCHES = 2  # that an engine's process has at once: one is computed, the next lies ready
_CHILD = "from workers.engine.process import main; main()"
_EXIT_TIMEOUT = 5.0  # for a process that ends by itself to become an exit code


@dataclass(frozen=True, slots=True)
class _BatchError:
    """What the child answers in place of samples."""

    summary: str
    traceback: str
    out_of_memory: bool = False


class EngineProcess:
    """The parent's end. Threads may ask at once: what is asked lies ready in the child while it computes something else.

    It answers in the order of asking. Its death is an error of the first question that it has not answered; those behind are
    asked again.
    """

    def __init__(self, spec: EngineSpec, step_timeout: float, load_timeout: float = 3600.0) -> None:
        self._spec = spec
        self._timeout = step_timeout
        self._load_timeout = load_timeout
        self.loading_since: float | None = None  # on the wall clock, as the next two: another process reads them
        self.busy_since: float | None = None
        self.answered: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._sending = threading.RLock()  # what enters the connection, its beginning and its end
        self._moved = threading.Condition()  # guards the next two
        self._line: deque[object] = deque()  # questions that were asked and not answered
        self._deaths = self._stops = 0
        self._memories = [PixelMemory(number) for number in range(BATCHES)]
        self._free: queue.SimpleQueue[PixelMemory] = queue.SimpleQueue()
        for memory in self._memories:
            self._free.put(memory)
        # Linux kills a child that asks for it (`die_with_parent`) when the thread that made it ends: this one lives on.
        self._maker = ThreadPoolExecutor(1, "engine-maker")

    def start(self) -> ModelInfo:
        """Start the process and wait until the model is loaded. Raises EngineStartError."""
        with self._sending:
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
        # A question can be larger than the socket's buffer: a stopped child would block `send` for ever.
        whole, fraction = divmod(self._timeout, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(fraction * 1e6)))
        with theirs:
            descriptors = [theirs.fileno(), *(memory.descriptor for memory in self._memories)]
            call = [sys.executable, "-P", "-c", _CHILD, *map(str, descriptors), str(os.getpid())]
            made = self._maker.submit(subprocess.Popen, call, pass_fds=descriptors, stdin=subprocess.DEVNULL)
            self._process = made.result()
        self._connection = Connection(ours.detach())
        try:
            self._connection.send(self._spec)
            if not self._connection.poll(self._load_timeout):
                self._end()
                raise EngineStartError(f"{self._spec.model} was not loaded after {self._load_timeout:g} s (HALP_LOAD_TIMEOUT)")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineStartError(
                f"the engine's process ended with {self._ended()} while it loaded {self._spec.model}"
            ) from error
        if isinstance(answer, _BatchError):
            self._end()
            if answer.traceback:
                logger.error("the engine could not be loaded:\n%s", answer.traceback)
            raise EngineStartError(f"cannot load {self._spec.model}: {answer.summary}")
        assert isinstance(answer, ModelInfo)
        return answer

    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Run one batch; `BATCHES` may be asked for at once. Raises BatchFailedError, and EngineDiedError."""
        memory = self._free.get()
        try:
            try:
                question = memory.put(requests)
            except OSError as error:
                raise BatchFailedError(f"no memory for the images ({error.strerror})", "", out_of_memory=True) from error
            answer = self._answer(question)
        finally:
            memory.clear()
            self._free.put(memory)
        self.answered = time.time()
        if isinstance(answer, _BatchError):
            raise BatchFailedError(answer.summary, answer.traceback, out_of_memory=answer.out_of_memory)
        return list(answer)

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Have a run's prompt rendered and cut. Raises RunRefusedError where its template cannot be used; EngineDiedError."""
        answer = self._answer(style)
        if isinstance(answer, _BatchError):
            what = "chat template or system prompt cannot be used"
            if (style.system, style.template) == (None, None):
                what = f"questions cannot be asked about {style.images or 'no'} image{'' if style.images == 1 else 's'}"
            raise RunRefusedError(f"the run's {what}: {answer.summary}")
        assert isinstance(answer, PromptParts)
        return answer

    def _answer(self, question: Any) -> Any:
        mine, stops = object(), self._stops
        while True:
            connection, deaths = self._send(mine, question)
            if self._comes_to(mine, deaths):
                break
            if self._stops != stops:
                raise EngineDiedError("the engine was stopped")
        answer = self._receive(connection, deaths)
        with self._moved:
            if self._deaths == deaths:
                self._line.popleft()
                self._moved.notify_all()
        return answer

    def _comes_to(self, mine: object, deaths: int) -> bool:
        """Wait for the answers to what was asked before; tell whether the process lived so long."""
        with self._ending_else(), self._moved:
            self._moved.wait_for(lambda: self._deaths != deaths or self._line[0] is mine)
            return self._deaths == deaths

    @contextmanager
    def _ending_else(self) -> Iterator[None]:
        """End the process where something unforeseen happens, an interrupt too: whose turn it is would not be known."""
        try:
            yield
        except EngineDiedError:
            raise
        except BaseException:
            self._end()
            raise

    def _send(self, mine: object, question: Any) -> tuple[Connection, int]:
        """Ask. Return the connection, and how many processes died before this one."""
        with self._sending:
            if self._connection is None:
                self.start()
            connection, process = self._connection, self._process
            assert connection is not None
            with self._moved:
                self._line.append(mine)
                deaths, is_first = self._deaths, self._line[0] is mine
            if is_first:
                self.busy_since = time.time()
            with self._ending_else():
                try:
                    connection.send(question)
                except OSError as error:
                    if is_first:
                        raise self._died(error, deaths) from error
                    if process is not None:
                        process.kill()  # or it is dead: whoever waits for its answer sees that
            return connection, deaths

    def _receive(self, connection: Connection, deaths: int) -> Any:
        """Wait for the next answer, which is the caller's."""
        self.busy_since = time.time()
        try:
            with self._ending_else():
                try:
                    if not connection.poll(self._timeout):
                        raise TimeoutError
                    return connection.recv()
                except (EOFError, OSError) as error:
                    raise self._died(error, deaths) from error
        finally:
            self.busy_since = None

    def _died(self, error: Exception, deaths: int) -> EngineDiedError:
        """End a process that is dead or hangs; return what became of it."""
        with self._sending:
            if self._deaths != deaths:
                return EngineDiedError("the engine's process was stopped")
            if isinstance(error, (TimeoutError, BlockingIOError)):
                self._end()
                return EngineDiedError(f"the engine gave no answer for {self._timeout:g} s and was stopped")
            return EngineDiedError(f"the engine's process ended with {self._ended()}")

    def stop(self) -> int | None:
        """End the process at once; return its exit code. What waits for an answer is told of a death."""
        self._stops += 1
        return self._end()

    def _end(self) -> int | None:
        if (process := self._process) is not None:
            process.kill()  # first: whoever is sending to it holds the lock
        with self._sending:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self.busy_since = self._process = None
            with self._moved:
                self._deaths += 1
                self._line.clear()
                self._moved.notify_all()
            return None if process is None else process.wait()

    def _ended(self) -> str:
        """Describe how a process ended that closed its end. Killed too early, it would seem to have died of SIGKILL."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_TIMEOUT)
        return _describe(self._end())

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


def _serve(connection: Connection, memories: Sequence[PixelMemory]) -> None:
    try:
        engine = make_engine(connection.recv())
    except Exception as error:  # noqa: BLE001  (whatever a checkpoint or driver raises is why the worker exits)
        connection.send(_error(error))
        return
    connection.send(engine.info)
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, asked), name="engine-listener", daemon=True).start()
    while (question := asked.get()) is not None:
        if isinstance(question, Exception):
            raise question
        try:
            if isinstance(question, Sent):
                answer: Any = engine.extract(memories[question.memory].take(question))
            else:
                answer = engine.prompt(question)
        except Exception as error:  # the batch boundary: the parent finds the one to blame
            if _is_sticky(error):
                raise
            answer = _error(error)
        if isinstance(answer, _BatchError) and answer.out_of_memory:
            engine.free_cache()  # here, not above: until the handler ends, the traceback holds on to the tensors
        connection.send(answer)


def _listen(connection: Connection, asked: queue.SimpleQueue[Any]) -> None:
    """Take in what is asked while something is computed; None at the parent's end, an error for what cannot be read."""
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        asked.put(None)
    except Exception as error:  # noqa: BLE001  (unpickling raises what it likes)
        asked.put(error)


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
    descriptor, *pixels, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    guard_logs()  # a checkpoint's own words are in transformers' warnings
    # Batches differ in size, and the allocator's fixed segments would leave holes: a 24 GB card needs them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _serve(Connection(descriptor), [PixelMemory(number, at) for number, at in enumerate(pixels)])

"""Decoders: processes in which images are decoded that may take for ever, crash the decoder or want all memory.

Each is started when one is needed and no other is free, and kept. A job has a bound of CPU time, after which the kernel kills
the process, and one of memory. Files go there as handles, and pixels come back in memory that both share: over the socket a
TIFF of 12 megapixels took 1.4 times as long as in one process, so it takes as long. Of a process that works on hostile bytes
nothing is unpickled: it answers in JSON.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.images.decoder import SECONDS, SECONDS_PER_MEGAPIXEL, Job, Wire
from storage.images.decoding import Facts, ImageRefusedError

Read = Callable[[int, int], bytes]  # offset and length to bytes of the image
Key = tuple[Any, ...]

_CHILD = "from storage.images.decoder import main; main()"
# A process that computes is ended by its CPU time. This is for one that was stopped, or gets hardly any CPU.
_WALL_SECONDS = 900.0
_STEP = 0.5  # between two looks whether this process is to end
_LONGEST_ANSWER = 64 << 10
_KEPT = 10_000
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


class DecoderGoneError(Exception):
    """A decoder's process ended for a reason that is not the image's: the same may work later."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job. `sha256`: of the image's bytes, where all were wanted."""

    facts: Facts
    array: npt.NDArray[np.uint8] | None
    sha256: str


class _Decoder:
    """One process, which one thread at a time uses."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        timeout = struct.pack("ll", int(_WALL_SECONDS), 0)
        for option in (
            socket.SO_SNDTIMEO,
            socket.SO_RCVTIMEO,
        ):  # of a process that was stopped in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, option, timeout)
        self.wire = Wire(ours)
        with theirs:
            theirs.setblocking(True)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a buffer for each core would count as its memory
            )

    def alive(self) -> bool:
        """Tell whether the process lives."""
        return self.process.poll() is None

    def end(self) -> int:
        """Kill the process; return its exit code, or the signal that had ended it, below 0."""
        self.wire.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # one that closed its end is about to be dead of what killed it
        self.process.kill()
        return self.process.wait()

    def receive(self, limit: float, ends: Callable[[], bool]) -> bytes:
        """Return the next message. Raises DecoderGoneError where none comes in time or this process is to end."""
        while not self.wire.connection.poll(_STEP):
            if time.monotonic() > limit:
                raise DecoderGoneError(f"gave no answer for {_WALL_SECONDS:.0f} s")
            if ends():
                raise DecoderGoneError("was ended, since this process ends")
        return self.wire.connection.recv_bytes(_LONGEST_ANSWER)


class Decoders:
    """As many processes as there are cores, at most. Thread-safe."""

    def __init__(self, number: int | None = None) -> None:
        self._places = threading.BoundedSemaphore(number or max(2, len(os.sched_getaffinity(0))))
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()
        self._refused: OrderedDict[Key, tuple[str, str]] = OrderedDict()
        self._ends_at: float | None = None

    def end(self, grace: float) -> None:
        """Begin no more work, and break off after some seconds what is not done: this process is to end."""
        self._ends_at = time.monotonic() + grace

    def run(self, source: int | Read, job: Job, key: Key = ()) -> Result:
        """Do a job in a decoder, on an open file or on what a function returns. Of an array others see the same memory.

        `key` names the image's content and the job: what was refused once is refused at once when it comes again. Raises
        ImageRefusedError, MemoryError, DecoderGoneError, OSError.
        """
        self._refuse_known(key)
        while not self._places.acquire(timeout=_STEP):
            self._refuse_at_end()
        try:
            self._refuse_at_end()
            self._refuse_known(key)
            return self._run(source, job)
        except ImageRefusedError as error:
            if key:
                self._refused[key] = (error.reason, error.what)
                while len(self._refused) > _KEPT:
                    self._refused.popitem(last=False)
            raise
        finally:
            self._places.release()

    def _refuse_at_end(self) -> None:
        if self._ends_at is not None:
            raise DecoderGoneError("was not begun, since this process ends")

    def _refuse_known(self, key: Key) -> None:
        if known := self._refused.get(key):
            raise ImageRefusedError(*known)

    def _run(self, source: int | Read, job: Job) -> Result:
        decoder = self._take()
        try:
            result = _talk(decoder, source, job, lambda: self._ends_at is not None and time.monotonic() > self._ends_at)
        except (EOFError, ConnectionError) as error:
            raise _ended(decoder.end()) from error
        except ImageRefusedError:
            self._give_back(decoder)
            raise
        except BaseException:  # whatever was not answered would be the answer to the next job
            decoder.end()
            raise
        self._give_back(decoder)
        return result

    def _take(self) -> _Decoder:
        with self._lock:
            while self._idle:
                decoder = self._idle.pop()
                if decoder.alive():
                    return decoder
                decoder.end()
        return _Decoder()

    def _give_back(self, decoder: _Decoder) -> None:
        with self._lock:
            self._idle.append(decoder)


def _talk(decoder: _Decoder, source: int | Read, job: Job, ends: Callable[[], bool]) -> Result:
    limit = time.monotonic() + _WALL_SECONDS
    decoder.wire.connection.send(job)
    if isinstance(source, int):
        decoder.wire.send_handle(source)
    while True:
        message = decoder.receive(limit, ends)
        kind, body = message[:1], message[1:]
        if kind == b"r" and not isinstance(source, int):
            decoder.wire.connection.send_bytes(source(*struct.unpack("QQ", body)))
        elif kind == b"m":
            raise MemoryError
        elif kind == b"o":
            raise OSError(int(body), os.strerror(int(body)))
        elif kind == b"e":
            reason, what = json.loads(body)
            raise ImageRefusedError(str(reason), str(what))
        else:
            facts, shape, digest = json.loads(body)
            array = None if shape is None else _received(decoder.wire, [int(side) for side in shape])
            return Result([int(fact) for fact in facts], array, str(digest))


def _received(wire: Wire, shape: list[int]) -> npt.NDArray[np.uint8]:
    """Return an array in the memory whose handle comes next."""
    descriptor = wire.receive_handle()
    try:
        # Were it cut later, using the array would kill this process.
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise DecoderGoneError("gave memory that may shrink")
        return np.frombuffer(mmap.mmap(descriptor, math.prod(shape)), np.uint8).reshape(shape)
    finally:
        os.close(descriptor)


def _ended(code: int) -> Exception:
    """Return what the end of a decoder says of its image."""
    if code == -signal.SIGPROF:
        return ImageRefusedError(
            "image_too_slow",
            f"takes too long to decode, over {SECONDS:.0f} s and {SECONDS_PER_MEGAPIXEL:g} s for each megapixel: save it again",
        )
    if -code in _CRASHES:
        name = signal.Signals(-code).name
        return ImageRefusedError("image_corrupt", f"makes the decoder crash ({name}): replace it")
    return DecoderGoneError(f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")


decoders = Decoders()

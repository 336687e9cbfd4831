"""The process of a decoder: it asks for an image's bytes, works on them, and answers. Its bounds are set here, by itself."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from storage.images.decoding import HEADER, MAX_IMAGE_BYTES, Facts, ImageRefusedError, Work, filled, work_on
from storage.images.opening import read_bounded

# The slowest honest format is JPEG 2000: 0.2 s a megapixel (2026-11-25, AMD EPYC, shared).
SECONDS = 10.0
SECONDS_PER_MEGAPIXEL = 0.5
_MEMORY = 6 << 30  # 100 megapixels of 16 bits with transparency take 3 GB while they are converted


@dataclass(frozen=True, slots=True)
class Job:
    """Work on an image of which the handle follows, or that has `by_ranges` bytes, which are asked for.

    `whole`: all bytes are read first. `seconds`: of CPU, besides those for its pixels.
    """

    work: Work
    arguments: tuple[Any, ...]
    whole: bool = True
    by_ranges: int | None = None
    seconds: float = SECONDS


class Wire:
    """One end of the socket between the two processes: messages, and handles of open files."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)  # Celery's shutdown sets a timeout for new sockets, and with one they do not block
        self._socket = end
        self.connection = Connection(os.dup(end.fileno()))

    def send_handle(self, descriptor: int) -> None:
        """Send a handle on an open file."""
        socket.send_fds(self._socket, [b"h"], [descriptor])

    def receive_handle(self) -> int:
        """Return the handle that comes next. Raises EOFError."""
        received = socket.recv_fds(self._socket, 1, 1)[1]
        if not received:
            raise EOFError
        os.set_inheritable(received[0], False)
        return received[0]

    def close(self) -> None:
        """Close this end."""
        self.connection.close()
        self._socket.close()


class _Borrowed(io.RawIOBase):
    """The image's file, which is read where it is open: in the parent."""

    def __init__(self, connection: Connection, size: int) -> None:
        self._connection = connection
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._fetch(min(len(view), self._size - self._at))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._fetch(self._size - self._at)

    def _fetch(self, length: int) -> bytes:
        if length <= 0:
            return b""
        self._connection.send_bytes(b"r" + struct.pack("QQ", self._at, length))
        data = self._connection.recv_bytes()
        self._at += len(data)
        return data


def main() -> None:
    """Serve the parent until it closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # both reach the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bounded = _bound_memory()
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    with suppress(EOFError, ConnectionError):
        while True:
            _answer(wire, wire.connection.recv(), bounded)


def _bound_memory() -> bool:
    """Bound this process's memory; tell whether that is our own bound, not a lower one that was there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft <= _MEMORY:
        return False
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
    return True


def _answer(wire: Wire, job: Job, bounded: bool) -> None:
    try:
        file, digest = _source(wire, job)
        with file:
            signal.setitimer(signal.ITIMER_PROF, job.seconds)
            facts, array = work_on(file, _timed(job), *job.arguments)
    except ImageRefusedError as error:
        wire.connection.send_bytes(b"e" + json.dumps([error.reason, error.what[:1000]]).encode())
    except MemoryError:
        what = f"takes over {_MEMORY >> 30} GB of memory to decode: shrink it"
        wire.connection.send_bytes(b"e" + json.dumps(["image_too_large", what]).encode() if bounded else b"m")
    except OSError as error:  # of reading: what a decoder raises is refused
        wire.connection.send_bytes(b"o%d" % (error.errno or errno.EIO))
    else:
        shape = None if array is None else array.shape
        wire.connection.send_bytes(b"f" + json.dumps([facts, shape, digest]).encode())
        if array is not None:
            _send(wire, array)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _source(wire: Wire, job: Job) -> tuple[BinaryIO, str]:
    """Return the image's file, and the digest of its bytes where all are wanted: then they are in memory.

    So decoders meet no I/O error, which would seem to be damage.
    """
    if job.by_ranges is not None:
        return io.BufferedReader(_Borrowed(wire.connection, job.by_ranges), HEADER), ""
    handle = wire.receive_handle()
    os.lseek(handle, 0, os.SEEK_SET)  # it is where the parent's is, too
    if not job.whole:
        return os.fdopen(handle, "rb"), ""
    try:
        data = filled(read_bounded(handle, MAX_IMAGE_BYTES))
    finally:
        os.close(handle)
    return io.BytesIO(data), hashlib.sha256(data).hexdigest()


def _send(wire: Wire, array: npt.NDArray[np.uint8]) -> None:
    """Send an array as the handle of memory that holds it."""
    descriptor = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = array.reshape(-1).data
        while view:
            view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        wire.send_handle(descriptor)
    finally:
        os.close(descriptor)


def _timed(job: Job) -> Work:
    """Return the job's work with time for the pixels that the image has, from when that is known."""

    def timed(image: Image.Image, *arguments: Any) -> tuple[Facts, npt.NDArray[np.uint8] | None]:
        seconds = job.seconds + SECONDS_PER_MEGAPIXEL * image.width * image.height / 1e6
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return job.work(image, *arguments)

    return timed

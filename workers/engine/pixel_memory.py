"""Pixels on their way to the engine's process: each image of a batch copied once into memory that both processes map.

The memory has no name that could be left behind: it is gone with the last of the two processes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from workers.engine.interface import Request

_NONE: npt.NDArray[np.uint8] = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True, slots=True)
class Sent:
    """Requests without their pixels, and of each where those lie: the offset and the shape."""

    requests: tuple[Request, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]
    size: int
    memory: int  # in which of the memories


class PixelMemory:
    """One of the memories, by its number and its file descriptor; one batch at a time."""

    def __init__(self, number: int = 0, descriptor: int | None = None) -> None:
        self.number = number
        # As a file: it is closed when nobody has it any more.
        self._file = os.fdopen(os.memfd_create("halp-pixels") if descriptor is None else descriptor, "r+b", buffering=0)
        self.descriptor = self._file.fileno()

    def put(self, requests: Sequence[Request]) -> Sent:
        """Copy the pixels in. Raises OSError where there is no room."""
        offsets: dict[int, int] = {}
        images: list[npt.NDArray[np.uint8]] = []
        size = 0
        for request in requests:
            if id(request.pixels) not in offsets:
                offsets[id(request.pixels)] = size
                images.append(request.pixels)
                size += request.pixels.nbytes
        if size:
            os.posix_fallocate(self.descriptor, 0, size)  # now, with an error: a write beyond the machine's memory is a signal
            with mmap.mmap(self.descriptor, size) as memory:
                for image in images:
                    begin = offsets[id(image)]
                    memory[begin : begin + image.nbytes] = image.tobytes()
        places = tuple((offsets[id(request.pixels)], request.pixels.shape) for request in requests)
        return Sent(tuple(replace(request, pixels=_NONE) for request in requests), places, size, self.number)

    def take(self, sent: Sent) -> list[Request]:
        """Return the requests with their pixels, which lie in the memory: they are good until the batch is answered."""
        if not sent.size:
            return list(sent.requests)
        memory = mmap.mmap(self.descriptor, sent.size, access=mmap.ACCESS_COPY)
        images = {
            (offset, shape): np.frombuffer(memory, np.uint8, int(np.prod(shape)), offset).reshape(shape)
            for offset, shape in set(sent.places)
        }
        return [replace(request, pixels=images[place]) for request, place in zip(sent.requests, sent.places, strict=True)]

    def clear(self) -> None:
        """Give the memory back to the machine."""
        os.ftruncate(self.descriptor, 0)

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

Place = tuple[int, tuple[int, ...]]  # an image's offset and shape


@dataclass(frozen=True, slots=True)
class Sent:
    """Requests without their images, and of each where those lie."""

    requests: tuple[Request, ...]
    places: tuple[tuple[Place, ...], ...]
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
        for image in (image for request in requests for image in request.images):
            if id(image) not in offsets:
                offsets[id(image)] = size
                images.append(image)
                size += image.nbytes
        if size:
            os.posix_fallocate(self.descriptor, 0, size)  # now, with an error: a write beyond the machine's memory is a signal
            with mmap.mmap(self.descriptor, size) as memory:
                for image in images:
                    begin = offsets[id(image)]
                    memory[begin : begin + image.nbytes] = image.tobytes()
        places = tuple(tuple((offsets[id(image)], image.shape) for image in request.images) for request in requests)
        return Sent(tuple(replace(request, images=()) for request in requests), places, size, self.number)

    def take(self, sent: Sent) -> list[Request]:
        """Return the requests with their pixels, which lie in the memory: they are good until the batch is answered."""
        if not sent.size:
            return list(sent.requests)
        memory = mmap.mmap(self.descriptor, sent.size, access=mmap.ACCESS_COPY)
        images = {
            (offset, shape): np.frombuffer(memory, np.uint8, int(np.prod(shape)), offset).reshape(shape)
            for offset, shape in {place for places in sent.places for place in places}
        }
        found = (tuple(images[place] for place in places) for places in sent.places)
        return [replace(request, images=its) for request, its in zip(sent.requests, found, strict=True)]

    def clear(self) -> None:
        """Give the memory back to the machine."""
        os.ftruncate(self.descriptor, 0)

"""What tests have decoders do: functions of a module that their processes can import."""

from __future__ import annotations

import errno
import os

from PIL import Image


def size_of(image: Image.Image) -> tuple[list[int], None]:
    image.load()
    return list(image.size), None


def endless(image: Image.Image) -> tuple[list[int], None]:
    while True:
        pass


def dies_of(image: Image.Image, number: int) -> tuple[list[int], None]:
    os.kill(os.getpid(), number)
    return [], None


def greedy(image: Image.Image) -> tuple[list[int], None]:
    return [len(bytearray(7 << 30))], None


def stops(image: Image.Image) -> tuple[list[int], None]:
    raise OSError(errno.EIO, "not of the file")

"""Pixels reach the engine's process as they are, each image once, and nothing is left of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.engine import pixel_memory
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.pixel_memory import PixelMemory
from workers.engine.process import EngineProcess
from workers.errors import BatchFailedError


def requests(seed: int, *shapes: tuple[int, int]) -> list[Request]:
    random, recipe = np.random.default_rng(seed), Recipe(layers=(0,))
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    return [
        Request(f"{seed}:{n % len(images)}", (images[n % len(images)],), (3, 4, n), 9, recipe) for n in range(2 * len(images))
    ]


def test_each_image_goes_once_and_unchanged() -> None:
    memory = PixelMemory()
    for seed in range(3):
        sent = requests(seed, (28, 56), (57, 31), (0, 0))
        sent[1] = Request("strided", (np.full((40, 40, 3), seed, np.uint8)[::2, 1::3],), (3,), 9, sent[1].recipe)
        sent += [Request("two", (*sent[0].images, *sent[1].images), (3,), 9, sent[1].recipe), replace(sent[0], images=())]
        message = memory.put(sent)
        assert message.size == sum({id(image): image.nbytes for r in sent for image in r.images}.values())
        assert not any(request.images for request in message.requests)
        taken = memory.take(message)
        for ours, theirs in zip(taken, sent, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images, strict=True))
            assert (ours.image_key, ours.suffix_ids) == (theirs.image_key, theirs.suffix_ids)
        assert len({id(i) for request in taken for i in request.images}) == len({id(i) for r in sent for i in r.images})
        memory.clear()
        assert os.fstat(memory.descriptor).st_size == 0


def test_no_room_is_told_of_and_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = EngineProcess(EngineSpec("fake:0", "fake", "main", "float32", str(tmp_path)), 30)
    first = engine.extract(requests(1, (28, 28)))

    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pixel_memory.os, "posix_fallocate", refuse)
        with pytest.raises(BatchFailedError, match="no memory for the images") as caught:
            engine.extract(requests(1, (28, 28)))
        assert caught.value.out_of_memory
    again = engine.extract(requests(1, (28, 28)))
    engine.stop()
    assert [sample.answer for sample in again] == [sample.answer for sample in first]
    assert [os.fstat(memory.descriptor).st_size for memory in engine._memories] == [0, 0]

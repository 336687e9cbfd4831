"""Time of an engine's stages, and how much of it the device is busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Timers:
    """Adds up the time of stages: between events on the GPU, which do not make it wait, or by the clock on a CPU."""

    cuda: bool
    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begun = self._now()
            result = function(*arguments, **options)
            self.spans.setdefault(stage, []).append((begun, self._now()))
            return result

        return timed

    def seconds(self, stage: str) -> float:
        """Return a stage's time so far."""
        spans = self.spans.get(stage, [])
        return sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def stages_timed(engine: Any, timers: Timers) -> Iterator[None]:
    """Time the engine's stages while the context lasts."""
    slots = engine._slots
    parts = (
        (engine._family.core.visual, "forward", "vision"),
        (engine._prefixes, "run", "images"),
        (slots, "take", "suffix"),
        (slots, "run", "suffix"),
        (slots, "decode", "decode"),
    )
    with ExitStack() as stack:
        for owner, name, stage in parts:
            stack.enter_context(mock.patch.object(owner, name, timers.around(stage, getattr(owner, name))))
        yield


def synchronised(device: torch.device) -> float:
    """Return the time once the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def busy_share(device: torch.device, work: Callable[[], Any]) -> tuple[float, int] | None:
    """Do some work; return the share of its time in which a kernel or a copy ran, and how many ran. None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken = time.perf_counter() - begun
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type.name == "CUDA")
    busy, until = 0.0, 0.0
    for start, end in spans:  # microseconds
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6 / taken, len(spans)

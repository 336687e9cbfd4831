"""Taking modules' outputs while a forward runs, and ending it where nothing more is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


class _Enough(Exception):
    """Raised by a hook to end a forward early."""


@contextmanager
def outputs(modules: dict[int, torch.nn.Module], take: Callable[[Tensor], Tensor]) -> Iterator[dict[int, Tensor]]:
    """Collect what `take` makes of each module's output while the context lasts."""
    captured: dict[int, Tensor] = {}

    def hook(key: int) -> Callable[..., None]:
        def collect(_module: Any, _inputs: Any, out: Any) -> None:
            captured[key] = take(out[0] if isinstance(out, tuple) else out)  # a tuple before transformers 5

        return collect

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(modules: dict[int, torch.nn.Module], take: Callable[[Tensor], Tensor]) -> Iterator[dict[int, Tensor]]:
    """Collect what `take` makes of the states that enter each module while the context lasts."""
    captured: dict[int, Tensor] = {}

    def hook(key: int) -> Callable[..., None]:
        def collect(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            captured[key] = take(args[0] if args else kwargs["hidden_states"])

        return collect

    handles = [module.register_forward_pre_hook(hook(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ending_after(module: torch.nn.Module | None) -> Iterator[None]:
    """End the forward in this context after a module; None lets it run. Register it last: it ends later hooks too."""
    if module is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _Enough

    handle = module.register_forward_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        handle.remove()


def to_host(found: Sequence[Mapping[str, Tensor]]) -> list[dict[str, np.ndarray]]:
    """Return vectors by name on the host, in their dtype: all of a batch in one copy."""
    vectors = [vector.reshape(-1) for one in found for vector in one.values()]
    if not vectors:
        return [{} for _ in found]
    device = vectors[0].device  # of a model on several GPUs, layers are on others
    joined = torch.cat([vector.to(device) for vector in vectors])
    if device.type == "cuda":
        pinned = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
        joined = pinned.copy_(joined)
    parts = iter(np.split(as_array(joined), np.cumsum([len(vector) for vector in vectors])[:-1]))
    return [{name: next(parts).reshape(vector.shape) for name, vector in one.items()} for one in found]


def as_array(values: Tensor) -> np.ndarray:
    """Return a tensor on the host as an array of its dtype."""
    return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if values.dtype == torch.bfloat16 else values.numpy()

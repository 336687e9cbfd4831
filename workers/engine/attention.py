"""Attention without padding or masks, among tokens of many sequences that lie in one row.

`attending` has a text decoder's layers attend by a function of ours, registered with transformers (`AttentionInterface`).
`Spans` are sequences that lie behind one another in the row, of which each sees itself alone: images in a vision tower, an
image's windows there, the prompts of several images in the decoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from workers.engine.kernels import is_plain
from workers.errors import in_a_line

logger = logging.getLogger(__name__)
_NAME = "halp_row"

# (1, heads, N, d), what the cache's layer gave as keys and values, scale, window: to (1, N, heads, d)
Attend = Callable[[Tensor, Tensor, Tensor, float | None, int | None], Tensor]
_attending: list[Attend] = []  # at most one: the engine's process has one model


def configs_of(decoder: Any) -> list[Any]:
    """Return the configs that say which attention a decoder's layers use."""
    found = [config for module in decoder.modules() if (config := getattr(module, "config", None)) is not None]
    return list({id(config): config for config in found}.values())


@contextmanager
def attending(configs: Sequence[Any], attend: Attend) -> Iterator[None]:
    """Have layers of these configs attend by a function while the context lasts; no masks are made for it."""
    before = [config._attn_implementation for config in configs]
    _attending.append(attend)
    for config in configs:
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        _attending.pop()
        for config, name in zip(configs, before):
            config._attn_implementation_internal = name


def _attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any = None, *, scaling: float | None = None,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    return _attending[-1](query, key, value, scaling, sliding_window), None


AttentionInterface.register(_NAME, _attend)


def flash_takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether flash attention has a kernel for heads of this width: in two bytes, since Ampere."""
    if device.type != "cuda" or dtype.itemsize != 2 or width % 8 or width > 256:
        return False
    return not torch.cuda.is_available() or _runs_flash(device)


@cache
def _runs_flash(device: torch.device) -> bool:
    """Try flash attention with lengths, as we call it, on a device: an older one, or another torch, may have another."""
    states = torch.zeros(2, 1, 64, device=device, dtype=torch.bfloat16)
    begins = torch.tensor([0, 2], dtype=torch.int32, device=device)
    try:
        torch.ops.aten._flash_attention_forward(states, states, states, begins, begins, 2, 2, 0.0, True, False, scale=1.0)
    except (RuntimeError, TypeError) as error:
        logger.warning("flash attention cannot be used on %s, which is slower: %s", device, in_a_line(error))
        return False
    return True


class Spans:
    """Sequences that lie behind one another in a row, by their lengths, which the host knows."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = [length for length in lengths if length]
        self._begins: dict[torch.device, Tensor] = {}
        self._places: dict[torch.device, list[Tensor]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool = False, window: int | None = None
    ) -> Tensor:
        """Return attention (N, heads, d) of queries (N, heads, d) over keys and values (N, fewer heads, d)."""
        if flash_takes(query.device, query.dtype, query.shape[-1]) and not is_plain():
            longest = max(self.lengths)
            begins = self.begins(query.device)
            out: Tensor = torch.ops.aten._flash_attention_forward(
                query, key, value, begins, begins, longest, longest, 0.0, causal, False, scale=scale,
                window_size_left=None if window is None else window - 1,
            )[0]  # fmt: skip
            return out
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        result = torch.empty_like(query)
        for places in self._by_length(query.device):
            alone = len(self.lengths) == 1
            # (sequences, heads, length, d)
            q, k, v = ((x[None] if alone else x[places]).transpose(1, 2) for x in (query, key, value))
            length, mask = q.shape[2], None
            if causal and window is not None and window < length:
                mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale)
            result[places] = out.transpose(1, 2)
        return result

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Return a decoder layer's attention (1, N, heads, d) of queries, keys and values (1, heads, N, d)."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        return self.attend(query, key, value, scale=scale, causal=True, window=window)[None]

    def begins(self, device: torch.device) -> Tensor:
        """Return where each begins, and where the last one ends, (S + 1,) int32."""
        if device not in self._begins:
            self._begins[device] = torch.from_numpy(np.cumsum([0, *self.lengths], dtype=np.int32)).to(device)
        return self._begins[device]

    def _by_length(self, device: torch.device) -> list[Tensor]:
        """Return the places in the row of those of each length, (sequences, length)."""
        if device not in self._places:
            begins = np.cumsum([0, *self.lengths[:-1]])
            lengths = np.array(self.lengths)
            made = (begins[lengths == length][:, None] + np.arange(length) for length in sorted(set(self.lengths)))
            self._places[device] = [torch.from_numpy(places).to(device) for places in made]
        return self._places[device]

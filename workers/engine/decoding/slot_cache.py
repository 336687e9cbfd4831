"""The KV cache of slots, and attention over it: fixed places for sequences, each with a length of its own.

Tokens that are run together lie in one row, (1, N), whatever slots they are of; a plan says of each its slot and its place
there, and attention looks at the slot's tokens up to it. In bfloat16 on CUDA that is one call of flash attention; else torch's
own, for each slot where several of its tokens are run, and for all at once where it is one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer

from workers.engine.attention import attending, configs_of, flash_takes
from workers.engine.cache import Row
from workers.engine.models.base import Family


@dataclass(slots=True)
class Plan:
    """What a forward's layers share: where its tokens lie."""

    slot: Tensor  # (N,) of each token
    place: Tensor  # (N,) in its slot
    used: Tensor  # (S,) int32: each slot's tokens after the forward
    spans: Sequence[tuple[int, int, int, int]] = ()  # of a prefill: slot, its tokens' begin and end in the row, used after
    begins: Tensor | None = None  # (S + 1,) int32, in CUDA's prefill: each slot's tokens begin here
    longest: int = 1  # tokens of one slot
    slots: int = 0  # of decoding: as many from the first
    whole: bool = False  # all of them, in their order
    reach: int = 0  # of these, as many tokens


class _Layer(DynamicLayer):  # type: ignore[misc]
    """A decoder layer's part of the slots: keys and values (S, C, heads, d)."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.is_initialized = True
        self._owner = owner
        self.keys: Any = None
        self.values: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (1, heads, N, d) where the plan says; return all."""
        plan = self._owner.plan
        assert plan is not None
        slot, place = plan.slot.to(key_states.device), plan.place.to(key_states.device)
        self.keys[slot, place] = key_states[0].transpose(0, 1)
        self.values[slot, place] = value_states[0].transpose(0, 1)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """Say that nothing is cached: positions are given."""
        return 0

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how long a mask would be: none is made."""
        return self.keys.shape[1], 0


class SlotCache:
    """Keys and values of `number` slots of `capacity` tokens, in each layer of a decoder."""

    def __init__(self, family: Family, device: torch.device) -> None:
        self._configs = configs_of(family.decoder)
        self.cache = Cache(layers=[_Layer(self) for _ in family.layers])
        self.plan: Plan | None = None
        self.number = self.capacity = self.depth = 0  # depth: layers that have room
        self.flash = False
        self._device = device

    def allocate(self, row: Row, number: int, capacity: int) -> None:
        """Make room, of the shapes of a sequence's cache."""
        self.number, self.capacity, self.depth = number, capacity, len(row.kv)
        for layer, kv in zip(self.cache.layers, row.kv):  # without answers, later layers are not run
            assert isinstance(kv, Tensor)
            self.flash = flash_takes(self._device, kv.dtype, kv.shape[3])
            layer.keys, layer.values = (kv.new_zeros(number, capacity, kv.shape[1], kv.shape[3]) for _ in range(2))
        self.one_each = torch.arange(number + 1, dtype=torch.int32, device=self._device)
        self._rooms = self.one_each * capacity

    def release(self) -> None:
        """Free the memory."""
        for layer in self.cache.layers:
            layer.keys = layer.values = None

    def copy(self, rows: Sequence[Row], of: Sequence[int], chosen: Sequence[int]) -> None:
        """Copy rows[of[i]] into the slot chosen[i]: all of a layer at once."""
        starts = np.cumsum([0, *(row.length for row in rows)])
        lengths = [rows[i].length for i in of]
        source = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in of])
        place = np.concatenate([np.arange(length) for length in lengths])
        index = torch.from_numpy(np.array([source, np.repeat(chosen, lengths), place])).to(self._device)
        for layer, kv in zip(self.cache.layers, zip(*(row.kv for row in rows))):
            joined = torch.cat(kv, dim=2)  # (2, heads, L, d)
            taken, slot, at = index.to(joined.device)
            layer.keys[slot, at] = joined[0].transpose(0, 1)[taken]
            layer.values[slot, at] = joined[1].transpose(0, 1)[taken]

    def begins(self, spans: Sequence[tuple[int, int, int, int]]) -> Tensor:
        """Return where each slot's tokens begin in the row, (S + 1,) int32; spans are in the order of their slots."""
        sizes = np.zeros(self.number + 1, np.int32)
        for slot, begin, end, _ in spans:
            sizes[slot + 1] = end - begin
        return torch.from_numpy(sizes.cumsum(dtype=np.int32)).to(self._device)

    @contextmanager
    def serve(self, plan: Plan) -> Iterator[Cache]:
        """Have the decoder attend over the slots by a plan while the context lasts."""
        self.plan = plan
        with attending(self._configs, self.attend):
            yield self.cache

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Return attention (1, N, heads, d) of queries (1, heads, N, d) over keys and values (S, C, heads, d)."""
        plan = self.plan
        assert plan is not None
        if self.flash:
            return self._attend_flash(plan, query, key, value, scale, window)
        if plan.spans:
            return self._attend_spans(plan, query, key, value, scale, window)
        heads, groups, width = key.shape[2], query.shape[1] // key.shape[2], query.shape[3]
        asked = query[0].transpose(0, 1).reshape(-1, heads, groups, width)  # a group's queries look at one head
        slot = plan.slot.to(query.device)
        if not plan.whole:
            spread = asked.new_zeros(plan.slots, heads, groups, width)
            spread[slot] = asked
        else:
            spread = asked  # the slots in their order
        mask = _seen_by(plan.used[: plan.slots, None].to(query.device), plan.reach, window)[:, None, None]
        keys, values = (x[: plan.slots, : plan.reach].transpose(1, 2) for x in (key, value))
        out = scaled_dot_product_attention(spread, keys, values, mask, scale=scale)  # (slots, heads, groups, d)
        chosen = out if spread is asked else out[slot]
        return chosen.reshape(1, -1, query.shape[1], width)

    @staticmethod
    def _attend_spans(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        heads, width = key.shape[2], query.shape[3]
        groups = query.shape[1] // heads
        out = query.new_zeros(1, query.shape[2], query.shape[1], width)
        for slot, begin, end, used in plan.spans:
            size = end - begin
            asked = query[:, :, begin:end].reshape(1, heads, groups * size, width)
            places = torch.arange(used - size, used, device=query.device)[:, None] + 1
            mask = _seen_by(places, used, window).repeat(groups, 1)
            keys, values = (x[None, slot, :used].transpose(1, 2) for x in (key, value))
            found = scaled_dot_product_attention(asked, keys, values, mask, scale=scale)
            out[0, begin:end] = found.view(query.shape[1], size, width).transpose(0, 1)
        out[0, end:] = out[0, end - 1]  # what fills the row up is the last token again
        return out

    def _attend_flash(
        self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        heads, width = key.shape[2:]
        assert plan.begins is not None
        # The public varlen attention has no lengths within a fixed capacity before torch 2.14.
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1), key.view(-1, heads, width), value.view(-1, heads, width),
            plan.begins.to(query.device), self._rooms.to(query.device), plan.longest, self.capacity, 0.0, plan.longest > 1,
            False, scale=scale, seqused_k=plan.used.to(query.device),
            window_size_left=None if window is None else window - 1,
        )[0]  # fmt: skip
        return out[None]


def _seen_by(places: Tensor, reach: int, window: int | None) -> Tensor:
    """Return which of the first `reach` tokens queries see that see `places` (n, 1) of them, or a window's last: (n, reach)."""
    columns = torch.arange(reach, device=places.device)
    seen = columns < places
    return seen if window is None else seen & (columns >= places - window)

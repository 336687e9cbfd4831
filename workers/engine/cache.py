"""KV caches: of one row without padding, of a batch padded on the left, and of the images seen last."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_SPARE = 32  # tokens that a layer has room for beyond what it holds


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that writes into spare room: DynamicLayer copies the whole cache for every decoded token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_initialized: bool = False
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append states (B, heads, L, d); return all that the layer holds."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < end:
            self._room = (_with_room(self.keys, end + _SPARE), _with_room(self.values, end + _SPARE))
        for room, new in zip(self._room, (key_states, value_states)):
            room[:, :, begin:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; a row may be repeated."""
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self._room = None


def _with_room(states: Tensor, length: int) -> Tensor:
    room = states.new_empty(*states.shape[:2], length, states.shape[3])
    room[:, :, : states.shape[2]] = states
    return room


@dataclass(slots=True)
class Recurrent:
    """A recurrent layer's state of one sequence: transformers' own layer, with rows of one."""

    layer: Any

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return sum(state.nbytes for states in self._states(self.layer) for state in states.values() if state is not None)

    @classmethod
    def is_one(cls, layer: Any) -> bool:
        """Tell whether a cache's layer is recurrent."""
        return hasattr(layer, "recurrent_states")

    @classmethod
    def of_row(cls, layer: Any, row: int) -> Recurrent:
        """Return one sequence's state."""
        taken = copy.copy(layer)
        cls.select(taken, slice(row, row + 1))
        return cls(taken)

    @classmethod
    def stack(cls, states: Sequence[Recurrent]) -> Any:
        """Return a layer with a row for each state."""
        layer = copy.copy(states[0].layer)

        def joined(which: int, key: int) -> Any:
            found = [cls._states(one.layer)[which][key] for one in states]
            return None if found[0] is None else torch.cat([state for state in found if state is not None])

        layer.conv_states, layer.recurrent_states = (
            {key: joined(which, key) for key in kept} for which, kept in enumerate(cls._states(layer))
        )
        return layer

    @classmethod
    def select(cls, layer: Any, rows: Any) -> None:
        """Keep the given rows of a layer; copies, since the states are written in place."""
        layer.conv_states, layer.recurrent_states = (
            {k: None if v is None else v[rows].clone() for k, v in states.items()} for states in cls._states(layer)
        )

    @staticmethod
    def _states(layer: Any) -> tuple[dict[int, Tensor | None], dict[int, Tensor | None]]:
        return layer.conv_states, layer.recurrent_states


@dataclass(slots=True)
class Row:
    """One sequence's cache: of each layer (2, heads, L, d), and the text position of its next token.

    Not one tensor: of a model that lies on several GPUs, each layer's cache is where the layer is. A layer that attends to an
    image beside the text has another L: the image's.
    """

    kv: list[Tensor | Recurrent]
    length: int  # tokens
    next_position: int

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return sum(layer.nbytes for layer in self.kv)

    @property
    def growing_bytes(self) -> int:
        """Of that, what grows with the text."""
        return sum(kv.nbytes for kv in self.kv if not isinstance(kv, Recurrent) and kv.shape[2] == self.length)


@dataclass(slots=True)
class Batch:
    """Sequences that go on together, padded on the left."""

    cache: Cache
    mask: Tensor  # (B, cached tokens), 0 on padding
    next_position: Tensor  # (B,)
    extra: Tensor | None = None  # (B, …), what a family's decoder takes beside

    @classmethod
    def empty(cls, next_positions: Sequence[int], device: torch.device, layers: Sequence[Any] = ()) -> Batch:
        """Return a batch that has seen nothing; `next_positions` are those after its first forward.

        `layers`: of a model with recurrent layers, a cache's layers of all kinds in their order.
        """
        positions = torch.tensor(next_positions, device=device)
        return cls(
            new_cache(layers),
            torch.zeros(len(next_positions), 0, device=device).long(),
            positions,
        )

    @classmethod
    def of(cls, rows: Sequence[Row], index: Sequence[int], device: torch.device) -> Batch:
        """Return the batch whose i-th sequence goes on from rows[index[i]]."""
        width = max(row.length for row in rows)
        chosen = torch.tensor(index, device=device)
        cache = new_cache(rows[0].kv)
        for layer, kv in enumerate(zip(*(row.kv for row in rows))):
            if isinstance(kv[0], Recurrent):
                cache.layers[layer] = Recurrent.stack([kv[i] for i in index])
                continue
            here, longest = chosen.to(kv[0].device), max(one.shape[2] for one in kv)
            keys, values = (_stack_left([one[which] for one in kv], longest)[here] for which in (0, 1))
            cache.update(keys, values, layer)
        lengths = torch.tensor([row.length for row in rows], device=device)[chosen]
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        return cls(cache, mask, torch.tensor([row.next_position for row in rows], device=device)[chosen])

    def rows(self, lengths: Sequence[int], next_positions: Sequence[int]) -> list[Row]:
        """Take apart what lies behind one another in a batch of one row: each sequence's own cache."""
        ends = list(itertools.accumulate(lengths))
        spans = [(end - length, end) for end, length in zip(ends, lengths)]
        return [Row(self._of(*span, ends[-1]), *facts) for span, *facts in zip(spans, lengths, next_positions, strict=True)]

    def _of(self, begin: int, end: int, width: int) -> list[Tensor | Recurrent]:
        """Return what each layer keeps of some of the row's tokens; one that attends to an image: all of it."""
        kept: list[Any] = []
        for layer in self.cache.layers:
            if Recurrent.is_one(layer):
                kept.append(Recurrent.of_row(layer, 0))
            elif layer.is_initialized:
                tokens = slice(begin, end) if layer.keys.shape[2] == width else slice(None)
                kept.append((layer.keys[0, :, tokens], layer.values[0, :, tokens]))
        pairs = [pair for pair in kept if not isinstance(pair, Recurrent)]
        if len(pairs) == len(kept) and len({(keys.shape, keys.device) for keys, _ in pairs}) == 1:
            whole = torch.stack([state for pair in pairs for state in pair])  # all layers in one copy, apart as its views
            return list(whole.view(len(pairs), 2, *whole.shape[1:]).unbind(0))
        return [pair if isinstance(pair, Recurrent) else torch.stack(pair) for pair in kept]

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences."""
        for layer in self.cache.layers:
            Recurrent.select(layer, rows) if Recurrent.is_one(layer) else layer.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.next_position = self.next_position[rows]
        self.extra = None if self.extra is None else self.extra[rows]


class Sized(Protocol):
    """Something that says how much memory it holds."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        ...


T = TypeVar("T", bound=Sized)


@dataclass(slots=True)
class PrefixCache(Generic[T]):
    """The prefixes used last, bounded in bytes, so that an image's questions share theirs across batches."""

    max_bytes: int
    _kept: OrderedDict[Hashable, T] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, key: Hashable) -> T | None:
        """Return a prefix, if it is kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, prefix: T) -> None:
        """Keep a prefix in place of those used longest ago; one that is larger than the bound is not kept."""
        if prefix.nbytes > self.max_bytes or key in self._kept:
            return
        self._kept[key] = prefix
        self._bytes += prefix.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._bytes = 0


def new_cache(layers: Sequence[Any]) -> Cache:
    """Return an empty cache for layers of these kinds: attention grows, whatever is recurrent is transformers' own."""
    if not any(isinstance(layer, Recurrent) or Recurrent.is_one(layer) for layer in layers):
        return Cache(layer_class_to_replicate=GrowingLayer)
    kinds = [layer.layer if isinstance(layer, Recurrent) else layer for layer in layers]
    return Cache(layers=[type(kind)() if Recurrent.is_one(kind) else GrowingLayer() for kind in kinds])


def _stack_left(states: Sequence[Tensor], width: int) -> Tensor:
    """Stack (heads, L_i, d) to (B, heads, width, d) with zeros on the left."""
    stacked = states[0].new_zeros(len(states), states[0].shape[0], width, states[0].shape[2])
    for into, one in zip(stacked, states):
        into[:, width - one.shape[1] :] = one
    return stacked

"""What is stored of a question: its texts, its attributes, its vectors, each looked at before it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5g, h5o, h5s, h5t, h5z

from storage.fields import in_order, is_ragged
from storage.hdf5.trouble import named

if TYPE_CHECKING:
    from storage.hdf5.layout import Part

TEXTS = ("question", "image_id", "answer", "ground_truth_answer")
_MOST_VALUES = 1 << 16  # of a vector; language models are up to 16,384 wide
_MOST_VALUES_OF_TOKENS = 1 << 27  # of an answer: half a gigabyte
_MOST_LINKS = 4096  # of a question or a field; models have some hundred layers
_DEEPEST = 3  # `answer_token_representation/last/layer_21`
_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}
_HERE = {h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED}
_SLACK = 1024  # bytes by which stored values may be more than the values: of a deflate stream's blocks


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A vector of a question, or one for each token of its answer, before it is read."""

    part: Part
    where: str
    node: Any
    shape: tuple[int, ...]  # [D], or [T, D]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """Return the values, [D] or [T, D]."""
        values = np.empty(self.shape, self.dtype)
        with named(self.part.path):
            if not self.node.get_storage_size():
                raise self.part.refusal(self.where, "has no values in the file")
            self.node.read(h5s.ALL, h5s.ALL, values)
        return values

    def chunk(self) -> tuple[int, int]:
        """Return the byte offset and the stored size of its only chunk; 0 and 0 where it is stored otherwise."""
        with named(self.part.path):
            if self.node.get_create_plist().get_layout() != h5d.CHUNKED or self.node.get_num_chunks() != 1:
                return 0, 0
            stored = self.node.get_chunk_info(0)
            return stored.byte_offset, stored.size


class StoredQuestion:
    """A question's group."""

    def __init__(self, part: Part, key: str, node: Any) -> None:
        self._part, self._key, self._node = part, key, node

    def texts(self) -> dict[str, str]:
        """Return those of the four texts that there are."""
        self._part.look_at_heaps()
        with named(self._part.path):
            return {name: text for name in TEXTS if (text := self._text(name)) is not None}

    def attributes(self) -> dict[str, Any]:
        """Return the attributes: texts, numbers, arrays of numbers."""
        part = self._part
        part.look_at_heaps()
        with named(part.path):
            names = part.names_of(self._node, self._key)
            part.take(sum(map(len, names)), self._key)
            return {name: part.value_of(self._node, name, self._key) for name in names}

    def fields(self) -> list[str]:
        """Return the names of the vectors."""
        with named(self._part.path):
            return sorted(self._fields(self._node, "", 1), key=in_order)

    def vector(self, field: str) -> StoredVector | None:
        """Return a vector; None where there is none of that name."""
        steps = field.split("/")
        if len(steps) > _DEEPEST:
            return None
        node, where = self._node, self._key
        with named(self._part.path):
            for step in steps:
                where += f"/{step}"
                node = self._part.child(node, step, where) if isinstance(node, h5g.GroupID) else None
            return self._vector(node, where, _dimensions(field)) if isinstance(node, h5d.DatasetID) else None

    def _text(self, name: str) -> str | None:
        where = f"{self._key}/{name}"
        node = self._part.child(self._node, name, where)
        if node is None:
            return None
        if isinstance(node, h5d.DatasetID):
            shape, kind = self._shape(node, where), node.get_type()
            if shape == () and kind.get_class() == h5t.STRING and kind.is_variable_str():
                return self._part.string_of(node, kind, where)
        raise self._part.refusal(where, "is no text")

    def _fields(self, group: Any, prefix: str, depth: int) -> Iterator[str]:
        where = f"{self._key}/{prefix}"
        if depth > _DEEPEST:
            raise self._part.refusal(where, "lies deeper than a layer of a field")
        if group.get_num_objs() > _MOST_LINKS:
            raise self._part.refusal(where, f"holds more than {_MOST_LINKS:,} things")
        for name in self._part.links(group, where):
            node = h5o.open(group, name.encode())
            if isinstance(node, h5g.GroupID):
                yield from self._fields(node, f"{prefix}{name}/", depth + 1)
            elif isinstance(node, h5d.DatasetID) and len(self._shape(node, where + name)) == _dimensions(prefix + name):
                yield prefix + name

    def _shape(self, node: Any, where: str) -> tuple[int, ...]:
        properties = node.get_create_plist()
        # Before the shape: to tell that of a virtual dataset, HDF5 opens other files.
        if properties.get_layout() not in _HERE or properties.get_external_count():
            raise self._part.refusal(where, "has its values in another place")
        return node.shape or ()

    def _vector(self, node: Any, where: str, dimensions: int) -> StoredVector:
        refusal, properties, shape = self._part.refusal, node.get_create_plist(), self._shape(node, where)
        if any(properties.get_filter(n)[0] not in _FILTERS for n in range(properties.get_nfilters())):
            raise refusal(where, "is stored by other filters than gzip and shuffle")
        kind = node.get_type()
        if len(shape) != dimensions:
            raise refusal(where, f"has {len(shape)} dimensions, not {('one', 'two')[dimensions - 1]}")
        if kind.get_class() not in {h5t.FLOAT, h5t.INTEGER} or kind.get_size() not in {1, 2, 4, 8}:
            raise refusal(where, "holds something else than numbers")
        chunks = properties.get_chunk() if properties.get_layout() == h5d.CHUNKED else (1,) * dimensions
        size, room = math.prod(shape), math.prod(-(-length // chunk) * chunk for length, chunk in zip(shape, chunks))
        most = _MOST_VALUES if dimensions == 1 else _MOST_VALUES_OF_TOKENS
        if not 0 < size <= most or shape[-1] > _MOST_VALUES or room > 2 * most:
            chunk = " x ".join(f"{length:,}" for length in chunks)
            raise refusal(where, f"has {size:,} values in chunks of {chunk}; a vector has up to {_MOST_VALUES:,}")
        # A chunk is inflated whole, whatever it has been declared to hold.
        if node.get_storage_size() > 2 * room * kind.get_size() + _SLACK:
            raise refusal(where, "takes more space than its values need")
        return StoredVector(self._part, where, node, shape, node.dtype)


def _dimensions(field: str) -> int:
    return 2 if is_ragged(field) else 1

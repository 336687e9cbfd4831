"""The declared layout: the one way to open a part for reading. What is given out of it was looked at before it was read.

Any HDF5 file may have a part's name: one whose data are other files, one whose few bytes unfold to terabytes, one that
contains itself. So nothing is read but what docs/format.md declares, in a regular file, and no memory is taken for what a file
of that size cannot hold.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import h5py
import numpy as np
from h5py import h5, h5a, h5d, h5g, h5l, h5o, h5p, h5s, h5t

from storage.errors import LayoutError
from storage.hdf5.heaps import endless_heap
from storage.hdf5.stored import StoredQuestion
from storage.hdf5.trouble import named
from storage.naming import question_id
from storage.stores.object_file import File, open_raw

_STRING = h5t.py_create(h5py.string_dtype("utf-8"))  # in memory: a pointer to a Python object
# Texts and attributes take more memory than the file has bytes only where objects are shared, which in a part they never are,
# or where they are compressed as JSON (`rows`): of numbers that is 20 characters for 8 bytes.
_TEXT_RATIO, _TEXT_LEAST = 4, 16 << 20
# Questions of one image share their vectors. A question's own group takes a kilobyte, a vector of 7B 14 of them.
_VECTOR_RATIO, _VECTOR_LEAST = 32, 64 << 20


class Part:
    """A part while it is open."""

    def __init__(self, path: File, size: int, file: h5py.File, raw: io.RawIOBase) -> None:
        self.path = path
        self.size = size
        self._raw = raw
        self._heaps_seen = False
        self._root = file.id
        self.texts_left = _TEXT_LEAST + _TEXT_RATIO * size  # bytes of texts and attributes that may still be read

    @cached_property
    def keys(self) -> list[str]:
        """The keys at the root, in the order of a loop over the file."""
        with named(self.path):
            links = self.links(h5o.open(self._root, b"/"), "")
        if len(set(links.values())) < len(links):  # a few bytes could be a million questions
            raise self.refusal("/", "two questions are one group")
        return list(links)

    @cached_property
    def ids(self) -> list[str]:
        """The questions' ids, in the same order."""
        return [question_id(key) for key in self.keys]

    def attribute_names(self) -> list[str]:
        """Return the names of the root's attributes."""
        with named(self.path):
            return self.names_of(self._root, "/")

    def attribute(self, name: str) -> Any:
        """Return an attribute of the root: a text, a number, an array of numbers; None where there is none."""
        with named(self.path):
            return self.value_of(self._root, name, "/") if h5a.exists(self._root, name.encode()) else None

    def text(self, name: str) -> str | None:
        """Return an attribute of the root that is a text."""
        value = self.attribute(name)
        if value is not None and not isinstance(value, str):
            raise self.refusal(f"/@{name}", "is no text")
        return value

    def has(self, name: str) -> bool:
        """Tell whether the root has an attribute."""
        with named(self.path):
            return bool(h5a.exists(self._root, name.encode()))

    def question(self, key: str) -> StoredQuestion:
        """Return a question by a key that is there."""
        with named(self.path):
            node = self.child(self._root, key, key)
        if not isinstance(node, h5g.GroupID):
            raise self.refusal(key, "is something else than a question's group")
        return StoredQuestion(self, key, node)

    def allow_vectors(self, number: int, width: int, field: str) -> None:
        """Raise LayoutError where so many vectors cannot be in a file of this size."""
        if 4 * number * width > _VECTOR_LEAST + _VECTOR_RATIO * self.size:
            raise self.refusal(field, f"{number:,} vectors of {width:,} values are more than {self.size:,} bytes can hold")

    def refusal(self, what: str, reason: str) -> LayoutError:
        """Return the error for something in this file that the layout does not have."""
        return LayoutError(self.path, what, reason)

    def look_at_heaps(self) -> None:
        """Raise LayoutError where HDF5 would not come out of a heap of strings. Before the questions' own strings are read.

        In an object store they would have to be fetched for it, and are not.
        """
        if self._heaps_seen:
            return
        with named(self.path):
            at = endless_heap(self._raw) if isinstance(self._raw, io.FileIO) else None
        if at is not None:
            raise self.refusal(f"the heap of strings at byte {at:,}", "has no end")
        self._heaps_seen = True

    # For what is stored of a question, by handles of h5py's low-level interface

    def links(self, group: Any, where: str) -> dict[str, int]:
        """Return a group's links and where in the file each leads, in the order of a loop over it."""
        places: dict[bytes, int] = {}
        elsewhere: list[bytes] = []

        def note(name: bytes, link: Any) -> None:  # the same object at each call: its values must be taken now
            if link.type != h5l.TYPE_HARD:
                elsewhere.append(name)
            places[name] = link.u

        tracked = group.get_create_plist().get_link_creation_order() & h5p.CRT_ORDER_TRACKED
        order = h5.INDEX_CRT_ORDER if tracked else h5.INDEX_NAME
        group.links.iterate(note, idx_type=order, info=True)
        for name in elsewhere:
            raise self.refusal(f"{where}{name.decode(errors='replace')}", "is a link to another place")
        try:
            return {name.decode(): place for name, place in places.items()}
        except UnicodeDecodeError as error:
            raise self.refusal(f"{where}{error.object!r}", "is not UTF-8") from None

    def child(self, group: Any, name: str, where: str) -> Any:
        """Return what a link leads to within this file; None where there is no such link."""
        step = name.encode()
        if step in {b"", b"."} or b"\0" in step or not group.links.exists(step):
            return None
        if group.links.get_info(step).type != h5l.TYPE_HARD:
            raise self.refusal(where, "is a link to another place")
        return h5o.open(group, step)

    def names_of(self, node: Any, where: str) -> list[str]:
        """Return the names of an object's attributes."""
        names: list[bytes] = []
        h5a.iterate(node, names.append)
        return [self._decoded(name, f"{where}@{name!r}") for name in names]

    def value_of(self, node: Any, name: str, where: str) -> Any:
        """Return an attribute's value."""
        where = f"{where}@{name}"
        attribute = h5a.open(node, name.encode())
        kind, shape = attribute.get_type(), attribute.shape
        if kind.get_class() == h5t.STRING and shape == ():
            return self.string_of(attribute, kind, where)
        if shape is None or len(shape) > 2 or not is_number(kind):
            raise self.refusal(where, "is no text, no number and no array of numbers")
        self.take(math.prod(shape) * kind.get_size(), where)
        values = np.empty(shape, attribute.dtype)
        attribute.read(values)
        return values if shape else values[()]

    def string_of(self, stored: Any, kind: Any, where: str) -> str:
        """Return the text of a scalar attribute or dataset of strings."""
        everything = (h5s.ALL, h5s.ALL) if isinstance(stored, h5d.DatasetID) else ()
        if kind.is_variable_str():
            value = np.empty((), object)
            stored.read(*everything, value, _STRING)
        else:
            self.take(kind.get_size(), where)
            value = np.empty((), f"S{kind.get_size()}")
            stored.read(*everything, value)
        data = bytes(value[()] or b"")
        self.take(len(data), where)
        return self._decoded(data, where)

    def take(self, length: int, where: str) -> None:
        """Count bytes of texts and attributes, before they are read or kept."""
        self.texts_left -= length
        if self.texts_left < 0:
            raise self.refusal(where, f"its texts and attributes are more than {self.size:,} bytes can hold")

    def _decoded(self, data: bytes, where: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.refusal(where, "is not UTF-8") from None


@contextmanager
def open_part(file: File) -> Iterator[Part]:
    """Open a part for reading.

    Raises UserError where there is no such file, LayoutError where it is something else, NotReadError where the disk or the
    network did not give it, DamagedError where HDF5 cannot read it.
    """
    with named(file, "not a readable HDF5 file"):
        raw = open_raw(file)
    with raw:
        with named(file, "not a readable HDF5 file"):
            size = raw.seek(0, os.SEEK_END)
            opened = _open(raw)
        try:
            yield Part(file, size, opened, raw)
        finally:
            opened.close()  # one in an object store before the program ends: HDF5 would close it after Python has, and crash


def is_number(kind: Any) -> bool:
    """Tell whether an HDF5 type is that of a number or of a truth value."""
    kind_class = kind.get_class()
    if kind_class == h5t.ENUM:  # how h5py stores a truth value
        return bool(kind.get_size() == 1 and kind.dtype == np.bool_)
    return kind_class in {h5t.INTEGER, h5t.FLOAT} and kind.get_size() in {1, 2, 4, 8}


def _open(raw: io.RawIOBase) -> h5py.File:
    # Without locks: a part is written once, and where there is no lock manager HDF5 would refuse to open it
    # (https://github.com/h5py/h5py/issues/1101). By its handle: it is the file that was looked at, whatever has its name now.
    file = f"/dev/fd/{raw.fileno()}" if isinstance(raw, io.FileIO) else raw
    try:
        return h5py.File(file, "r", locking=False)
    except OSError as error:
        if "locking flag values don't match" not in str(error):
            raise
        return h5py.File(file, "r")  # this process has it open already, with a lock

"""Groups, texts and attributes of a part, by h5py's low-level interface: a third of the high-level one's time and space.

Types, spaces and property lists are made once. Attributes stay in the object's header however many they are: HDF5 would
give each group with more than eight a heap and an index of its own, 4 KB a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t

_MAX_COMPACT = 65535
_STRING = h5t.py_create(h5py.string_dtype("utf-8"), logical=True)
_OBJECT = h5t.py_create(h5py.string_dtype("utf-8"))  # in memory: a pointer to a Python object
_SCALAR = h5s.create(h5s.SCALAR)
_UTF8 = h5p.create(h5p.LINK_CREATE)
_UTF8.set_char_encoding(h5t.CSET_UTF8)
_GROUP = h5p.create(h5p.GROUP_CREATE)
_GROUP.set_attr_phase_change(_MAX_COMPACT, 0)
_GROUP.set_obj_track_times(False)
_TEXT = h5p.create(h5p.DATASET_CREATE)
_TEXT.set_obj_track_times(False)
_NUMBERS = {"i": h5t.NATIVE_INT64, "f": h5t.NATIVE_DOUBLE}


def create_group(parent: Any, name: str) -> Any:
    """Create a group below a file or group, both low-level."""
    return h5g.create(parent, name.encode(), None if name.isascii() else _UTF8, _GROUP)


def write_text(group: Any, name: str, text: str) -> None:
    """Write a scalar dataset, a variable-length UTF-8 string."""
    dataset = h5d.create(group, name.encode(), _STRING, _SCALAR, _TEXT)
    dataset.write(h5s.ALL, h5s.ALL, _string(text), _OBJECT)


def write_attributes(node: Any, attributes: Mapping[str, Any]) -> None:
    """Write an object's attributes: texts, numbers, lists of numbers; anything else as h5py would."""
    for name, value in attributes.items():
        if isinstance(value, str):
            h5a.create(node, name.encode(), _STRING, _SCALAR).write(_string(value), _OBJECT)
            continue
        numbers = np.asarray(value)
        if numbers.size and (kind := _NUMBERS.get(numbers.dtype.kind)) and numbers.dtype.itemsize == 8:
            # The type in memory too: h5py would make one from the array's, a fifth of an attribute's time.
            h5a.create(node, name.encode(), kind, _space(numbers.shape)).write(np.ascontiguousarray(numbers), kind)
        else:
            h5py.Group(node).attrs[name] = value


@lru_cache(maxsize=1024)
def _space(shape: tuple[int, ...]) -> Any:
    return h5s.create_simple(shape) if shape else _SCALAR


def clean(text: str) -> str:
    """Return a text as it is stored: HDF5 ends a string at its first NUL, and a lone surrogate has no UTF-8."""
    if text.isascii() and "\0" not in text:
        return text
    # Ids and texts are checked at enqueue; a model that emits a NUL must not cost the sample.
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _string(text: str) -> Any:
    array = np.empty((), object)
    array[()] = clean(text)
    return array

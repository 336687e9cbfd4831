"""The rows of a part: the texts and attributes of all its questions once more, in one root attribute. Format: docs/format.md.

HDF5 gives out a question's four texts and twenty attributes one by one, which takes many times what one of its vectors takes by
the column index. Packed as columns of JSON they are one read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ADVICE, DamagedError
from storage.hdf5.layout import Part
from storage.hdf5.objects import clean

ROWS = "rows"  # the root attribute
Columns = dict[str, list[Any]]  # a value for each question in key order; None where a question has none
_CARRIED_TWICE = "_csv"  # suffix of a CSV column that is called as one of our texts, or as these columns
_OURS = frozenset({"part", "vector"})


def encode_rows(rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> npt.NDArray[np.uint8]:
    """Return the root attribute for the questions' texts and attributes, in the order of the keys."""
    rows = list(rows)
    body = {"texts": _columns([texts for texts, _ in rows]), "attributes": _columns([facts for _, facts in rows])}
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=_plain).encode(errors="replace")
    return np.frombuffer(zlib.compress(data, 1), np.uint8)


def read_rows(part: Part) -> Columns:
    """Return the columns of an open part: question_id, the texts, the attributes. Without the root attribute, from the groups.

    Raises DamagedError, with the file's name, where the root attribute is not that of these keys.
    """
    ids, packed = part.ids, part.attribute(ROWS)
    texts, attributes = _unpack(part, packed) if packed is not None else _from_groups(part)
    lengths = {len(values) for values in [*texts.values(), *attributes.values()]}
    cleaned = [clean(question) for question in ids]
    if attributes.get("question_id", cleaned) != cleaned or lengths - {len(ids)}:
        raise DamagedError(f"{part.path}: the attribute `{ROWS}` does not fit its questions; {ADVICE}")
    columns: Columns = {"question_id": ids, **texts}
    for attribute, values in attributes.items():
        columns[_carried_as(attribute, texts, attributes)] = values
    return columns | {"question_id": ids}


def _carried_as(name: str, texts: Columns, attributes: Columns) -> str:
    """Return what an attribute is called in a frame: with `_csv` where the name is one of ours, as often as makes it free."""
    if name in texts or name in _OURS:
        name += _CARRIED_TWICE
        while name in attributes:
            name += _CARRIED_TWICE
    return name


def rows_problem(part: Part) -> str | None:
    """Return what is wrong with an open part's root attribute, compared with its groups; None where nothing is."""
    packed = part.attribute(ROWS)
    if packed is None:
        return None
    try:
        found = _unpack(part, packed)
    except DamagedError as error:
        return str(error)
    for kind, here, there in zip(("texts", "attributes"), found, _from_groups(part), strict=True):
        for name in here.keys() | there.keys():
            if json.dumps(here.get(name)) != json.dumps(there.get(name)):  # as text: not a number is equal to itself
                return f"the {kind} `{name}` differ between the attribute `{ROWS}` and the questions' groups"
    return None


def _unpack(part: Part, packed: Any) -> tuple[Columns, Columns]:
    try:
        inflater, most = zlib.decompressobj(), part.texts_left
        data = inflater.decompress(np.ascontiguousarray(packed, np.uint8).tobytes(), most)
        part.take(len(data), f"/@{ROWS}")
        if not inflater.eof:
            if len(data) == most:
                raise part.refusal(f"/@{ROWS}", f"unfolds to more than {part.size:,} bytes can hold")
            raise ValueError("it is cut")
        body = json.loads(data)
        texts, attributes = _declared(body["texts"]), _declared(body["attributes"])
        if any(not set(map(type, values)) <= {str, type(None)} for values in texts.values()):
            raise TypeError("a text is something else")
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{part.path}: the attribute `{ROWS}` is damaged ({error}); {ADVICE}") from error
    if b"\\" in data and rb"\u" in data:  # only there may a lone surrogate be, which no terminal takes
        return _cleaned(texts), _cleaned(attributes)
    return texts, attributes


def _declared(columns: Any) -> Columns:
    if not (isinstance(columns, dict) and all(isinstance(values, list) for values in columns.values())):
        raise TypeError("it holds no columns")
    return columns


def _from_groups(part: Part) -> tuple[Columns, Columns]:
    groups = [part.question(key) for key in part.keys]
    texts = _columns([group.texts() for group in groups])
    return texts, _columns([{name: _plain(value) for name, value in g.attributes().items()} for g in groups])


def _cleaned(columns: Columns) -> Columns:
    return {clean(n): [clean(v) if isinstance(v, str) else v for v in values] for n, values in columns.items()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [clean(v) if isinstance(v := row.get(name), str) else v for row in rows] for name in names}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value

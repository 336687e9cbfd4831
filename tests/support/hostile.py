"""Files that have a part's name and are none: each is one way to have a reader hang, crash, fill memory or read other files."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5s, h5t

FIELD = "query_token_representation/layer_3"
WIDTH = 8
SECRET = b"secret: what another file holds\n" * 64


def sound(path: Path, number: int = 2) -> None:
    """Write a file as the reference script does."""
    with h5py.File(path, "w") as file:
        for question in range(number):
            add_question(file, f"h{question}")


def add_question(file: h5py.File, key: str) -> h5py.Group:
    """Add a sound question."""
    group = file.create_group(key)
    for name in ("question", "image_id", "answer", "ground_truth_answer"):
        group.create_dataset(name, data=f"{name} of {key}")
    group.create_dataset(FIELD, data=np.arange(WIDTH, dtype=np.float32), compression="gzip", compression_opts=4)
    return group


def _edited(edit: Callable[[h5py.File, h5py.Group], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        sound(path)
        with h5py.File(path, "r+") as file:
            edit(file, file["h0"])

    return write


def _vector(**options: Any) -> Callable[[Path], None]:
    def edit(_: h5py.File, group: h5py.Group) -> None:
        del group[FIELD]
        group.create_dataset(FIELD, **options)

    return _edited(edit)


def _external_storage(file: h5py.File, group: h5py.Group) -> None:
    secret = Path(file.filename).with_name("secret.txt")
    secret.write_bytes(SECRET)
    del group[FIELD]
    group.create_dataset(FIELD, (WIDTH,), np.float32, external=[(str(secret), 0, 4 * WIDTH)])


def _external_text(file: h5py.File, group: h5py.Group) -> None:
    secret = Path(file.filename).with_name("secret.txt")
    secret.write_bytes(SECRET)
    del group["answer"]
    group.create_dataset("answer", (1,), "S32", external=[(str(secret), 0, 32)])


def _virtual(file: h5py.File, group: h5py.Group) -> None:
    other = Path(file.filename).with_name("other.hdf")
    with h5py.File(other, "w") as theirs:
        theirs["values"] = np.full(WIDTH, 42, np.float32)
    layout = h5py.VirtualLayout((WIDTH,), np.float32)
    layout[:] = h5py.VirtualSource(str(other), "values", (WIDTH,))
    del group[FIELD]
    group.create_virtual_dataset(FIELD, layout)


def _external_link(where: str) -> Callable[[h5py.File, h5py.Group], None]:
    def edit(file: h5py.File, _: h5py.Group) -> None:
        other = Path(file.filename).with_name("other.hdf")
        with h5py.File(other, "w") as theirs:
            add_question(theirs, "there")
        if where in file:
            del file[where]
        file[where] = h5py.ExternalLink(str(other), "/there/" + FIELD if "/" in where else "/there")

    return edit


def _soft_text(_: h5py.File, group: h5py.Group) -> None:
    del group["answer"]
    group["answer"] = h5py.SoftLink("/h1/answer")


def _deep(file: h5py.File, group: h5py.Group) -> None:
    node = group.id
    for _ in range(3000):
        node = h5py.h5g.create(node, b"d")


def _cycle(file: h5py.File, group: h5py.Group) -> None:
    group["again"] = group


def _fixed_text(file: h5py.File, group: h5py.Group) -> None:
    del group["answer"]
    kind = h5t.C_S1.copy()
    kind.set_size(2_000_000_000)
    h5d.create(group.id, b"answer", kind, h5s.create(h5s.SCALAR))


def _many_texts(file: h5py.File, group: h5py.Group) -> None:
    del group["answer"]
    group.create_dataset("answer", (10**10,), h5py.string_dtype(), chunks=(1000,))


def _replaced(name: str, value: Any, dtype: Any = None) -> Callable[[h5py.File, h5py.Group], None]:
    def edit(_: h5py.File, group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, data=value, dtype=dtype)

    return edit


def _attribute(name: str, value: Any, *, root: bool = True, dtype: Any = None) -> Callable[[Path], None]:
    return _edited(lambda file, group: (file if root else group).attrs.create(name, value, dtype=dtype))


def _not_utf8(file: h5py.File, group: h5py.Group) -> None:
    del group["answer"]
    text = np.array(b"\xff\xfe bad", dtype=h5py.string_dtype("utf-8"))
    group.create_dataset("answer", data=text)


def _name_not_utf8(file: h5py.File, _: h5py.Group) -> None:
    h5py.h5g.create(file.id, b"\xff\xfe")


def _bomb(file: h5py.File, group: h5py.Group) -> None:
    """Declare a few values, and put a stream there that inflates to 64 MB."""
    del group[FIELD]
    dataset = group.create_dataset(FIELD, (WIDTH,), np.float32, chunks=(WIDTH,), compression="gzip")
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    dataset.id.write_direct_chunk((0,), data)


def _index(rows: Any) -> Callable[[Path], None]:
    return _attribute(f"column:{FIELD}", np.array(rows, np.uint64))


def _index_bomb(path: Path) -> None:
    """Point the column index at a stream in the file that inflates to 64 MB."""
    sound(path)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    with h5py.File(path, "r+") as file:
        file["h0"].attrs["carrier"] = np.frombuffer(data[:60000], np.uint8)
        file.attrs[f"column:{FIELD}"] = np.array([[64, path.stat().st_size - 64, 0]] * 2, np.uint64)


def _rows_bomb(path: Path) -> None:
    packer = zlib.compressobj(9)
    data = packer.compress(b'{"texts": {"answer": ["') + b"".join(packer.compress(b"a" * (1 << 20)) for _ in range(50))
    _attribute("rows", np.frombuffer(data + packer.flush(), np.uint8))(path)


def _rows(body: Any) -> Callable[[Path], None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _attribute("rows", np.frombuffer(zlib.compress(data), np.uint8))


def _one_group_many_names(file: h5py.File, group: h5py.Group) -> None:
    group.attrs["long"] = "x" * 60000
    for number in range(20000):
        file[f"again{number}"] = group


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _damaged_heap(path: Path) -> None:
    """Zero the heap of strings behind its header: HDF5 then walks in a circle."""
    sound(path)
    data = bytearray(path.read_bytes())
    at = data.find(b"GCOL")
    assert at > 0
    data[at + 16 : at + 4096] = bytes(4096 - 16)
    path.write_bytes(data)


_COMPOUND = np.dtype([("a", np.float32), ("b", np.float32)])
KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "external storage": _edited(_external_storage),
    "external storage of a text": _edited(_external_text),
    "a virtual dataset": _edited(_virtual),
    "an external link for a question": _edited(_external_link("h0")),
    "an external link for a vector": _edited(_external_link(f"h0/{FIELD}")),
    "a soft link to itself": _edited(lambda file, _: file.__setitem__("loop", h5py.SoftLink("/loop"))),
    "a soft link for a text": _edited(_soft_text),
    "deep groups": _edited(_deep),
    "a group that holds itself": _edited(_cycle),
    "one group under many names": _edited(_one_group_many_names),
    "a dataset at the root": _edited(lambda file, _: file.create_dataset("values", data=np.arange(3))),
    "a type at the root": _edited(lambda file, _: file.__setitem__("kind", np.dtype("f4"))),
    "a terabyte of fill values": _vector(shape=(1 << 40,), dtype=np.float32, chunks=(1 << 20,), fillvalue=1.0),
    "a terabyte in one piece": _vector(shape=(1 << 38,), dtype=np.float32),
    "a chunk of a gigabyte": _vector(shape=(WIDTH,), maxshape=(None,), dtype=np.float32, chunks=(1 << 28,), compression="gzip"),
    "no values": _vector(shape=(WIDTH,), dtype=np.float32, chunks=(WIDTH,)),
    "an empty vector": _vector(shape=(0,), dtype=np.float32),
    "two dimensions": _vector(data=np.zeros((2, 4), np.float32)),
    "a gzip bomb": _edited(_bomb),
    "another filter": _vector(data=np.zeros(WIDTH, np.float32), compression="lzf"),
    "compound values": _vector(data=np.zeros(WIDTH, _COMPOUND)),
    "references": _vector(shape=(WIDTH,), dtype=h5py.ref_dtype),
    "lists of values": _vector(shape=(WIDTH,), dtype=h5py.vlen_dtype(np.float32)),
    "texts for values": _vector(data=["a"] * WIDTH, dtype=h5py.string_dtype()),
    "values of 2 GB each": _vector(shape=(WIDTH,), dtype=np.dtype("V2000000000")),
    "a text of two gigabytes": _edited(_fixed_text),
    "ten thousand million texts": _edited(_many_texts),
    "a number for a text": _edited(_replaced("answer", 5)),
    "a text that is not UTF-8": _edited(_not_utf8),
    "a name that is not UTF-8": _edited(_name_not_utf8),
    "an attribute of no value": _attribute("note", h5py.Empty("f4")),
    "an attribute of compound values": _attribute("note", np.zeros(3, _COMPOUND)),
    "an attribute of many texts": _attribute("note", ["a", "b"], dtype=h5py.string_dtype()),
    "an attribute that is a reference": _edited(lambda file, g: file.attrs.create("note", g.ref, dtype=h5py.ref_dtype)),
    "an attribute that is not UTF-8": _attribute("note", np.array(b"\xff", dtype=h5py.string_dtype()), root=False),
    "a run id that is a list": _attribute("run_id", [1, 2, 3]),
    "an index beyond the end": _index([[1 << 60, 100, 0], [64, 100, 0]]),
    "an index whose sums overflow": _index([[2**64 - 8, 16, 0], [64, 100, 0]]),
    "an index of negative numbers": _attribute(f"column:{FIELD}", np.array([[-5, 10, 0]] * 2)),
    "an index that is a text": _attribute(f"column:{FIELD}", "here"),
    "an index at a bomb": _index_bomb,
    "rows that are a bomb": _rows_bomb,
    "rows nested without end": _rows(b"[" * 200_000),
    "rows that are no columns": _rows({"texts": [1], "attributes": 2}),
    "rows that are numbers": _rows({"texts": {"answer": [1, 2]}, "attributes": {}}),
    "rows of lone surrogates": _rows({"texts": {"answer": ["\ud800", "b"]}, "attributes": {"question_id": ["x", "y"]}}),
    "a certificate that is none": _attribute("drift", '{"fields": 5}'),
    "failures that are none": _attribute("failures", '[1, 2]'),
    "no HDF5 at all": lambda path: path.write_bytes(os.urandom(4096)),
    "cut": lambda path: (sound(path), os.truncate(path, path.stat().st_size // 2))[0],
    "a damaged heap": _damaged_heap,
}  # fmt: skip

"""The heaps of strings in an HDF5 file: whether HDF5 comes to their end. It walks for ever in one with a zeroed page."""

from __future__ import annotations

import io
import os

_SIGNATURE = b"GCOL"  # https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, "Global Heap"
_AT_ONCE = 8 << 20
_HEADER, _OBJECT = 16, 16  # bytes
_LARGEST = 64 << 20  # of a heap that is looked into; HDF5 makes them of 4 KB, or as long as one text


def endless_heap(file: io.FileIO) -> int | None:
    """Return where in a file a heap lies that HDF5 would not come out of; None where there is none."""
    handle, start = file.fileno(), 0
    while data := os.pread(handle, _AT_ONCE, start):
        found = data.find(_SIGNATURE)
        while found >= 0:
            if _is_endless(os.pread(handle, _HEADER, start + found), handle, start + found):
                return start + found
            found = data.find(_SIGNATURE, found + 1)
        start += max(1, len(data) - len(_SIGNATURE) + 1)  # one may lie across the border
    return None


def _is_endless(header: bytes, handle: int, start: int) -> bool:
    length = int.from_bytes(header[8:16], "little")
    if header[4:8] != b"\1\0\0\0" or not _HEADER < length <= _LARGEST:
        return False  # these four bytes of something else
    heap, at = os.pread(handle, length, start), _HEADER
    while at + _OBJECT <= len(heap):
        size = int.from_bytes(heap[at + 8 : at + 16], "little")
        used = heap[at : at + 2] != b"\0\0"
        step = _OBJECT + -(-size // 8) * 8 if used else size  # that of the free space counts its own header
        if not step:
            return True
        at += step
    return False

"""What a file that is no image is, by how it begins: a viewer or a name may say otherwise."""

from __future__ import annotations

from storage.errors import UserError

LFS_POINTER = b"version https://git-lfs"  # how the stand-in begins that a clone without Git LFS has of a large file
_CONVERT = "convert it to JPEG or PNG"
_FETCH = "fetch the real file"
_BRANDS = {  # of ISO base media files, ISO/IEC 14496-12 and 23008-12
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC",
    b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF", b"crx ": "a camera's raw file (CR3)",
}  # fmt: skip
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (LFS_POINTER, "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (b"%PDF-", "a PDF", _CONVERT),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", _CONVERT),
    (b"\xff\x0a", "JPEG XL", _CONVERT),
    (b"8BPS", "a Photoshop document", _CONVERT),
    (b"gimp xcf", "a GIMP document", _CONVERT),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)", _CONVERT),
    (b"%!PS", "PostScript", _CONVERT),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", "take a frame of it"),
    (b"OggS", "an Ogg video or sound", "take a frame of it"),
    (b"FLV\x01", "a Flash video", "take a frame of it"),
    (b"\0\0\x01\xba", "an MPEG video", "take a frame of it"),
    (b"\0\0\x01\xb3", "an MPEG video", "take a frame of it"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _FETCH),
    (b"PAR1", "a Parquet file", _FETCH),
    (b"\x93NUMPY", "a NumPy array", "save it as PNG"),
)


def refuse_pointer(data: bytes, name: object) -> None:
    """Raise UserError where a file's first bytes say that it is a Git LFS pointer."""
    if data.startswith(LFS_POINTER):
        raise UserError(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def what_it_is(data: bytes) -> str | None:
    """Return what a file's first bytes say it is, with what to do about it; None where they say nothing.

    Formats that this build of Pillow reads are named too: ask after Pillow has refused the file.
    """
    for beginning, kind, cure in _BEGINNINGS:
        if data.startswith(beginning):
            return f"{kind}: {cure}"
    if data[4:8] == b"ftyp":
        if kind := _BRANDS.get(data[8:12], ""):
            return f"{kind}: {_CONVERT}"
        return "an MP4 or QuickTime video: take a frame of it"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "an AVI video: take a frame of it"
    return _text(data[:1024])


def _text(data: bytes) -> str | None:
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start and start.startswith(b"<"):
        return f"an SVG drawing: {_CONVERT}"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"an HTML page, such as a server's error: {_FETCH}"
    if start.startswith((b"<?xml", b"<error>")):
        return f"an XML document: {_FETCH}"
    if start.startswith((b'{"', b"[{", b'["')):
        return f"JSON, such as a server's error: {_FETCH}"
    return f"text: {_FETCH}" if start and start.decode(errors="replace").replace("\n", " ").isprintable() else None

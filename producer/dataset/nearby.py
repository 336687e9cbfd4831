"""Nearby names: what a directory holds, and which of its names are nearest to those of missing images.

It guesses nothing for a run: it says what the table or the directory might be changed to. Bounded, whatever the directory's
size: a few thousand names are listed, and of the rest only the spellings that a missing name suggests are looked for.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from urllib.parse import unquote

from producer.dataset.faults import short
from storage.errors import UserError
from storage.stores.location import VARIABLES, is_url
from storage.stores.store import some_objects

_LISTED = 5_000  # names of a directory and those below it
_EXPLAINED = 3  # missing images
_NAMED = 3  # files of the directory
_KINDS = 4  # extensions
_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
_COCO = ("", *(f"COCO_{split}_" for split in ("val2014", "train2014", "test2015", "val2017", "train2017", "test2014")))
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


def is_web(image_id: str) -> bool:
    """Tell whether an image id is a URL that is no location of ours, such as `https://…`: it is not fetched."""
    match = _URL.match(image_id.strip())
    return match is not None and match[1] not in VARIABLES


def describe_missing(missing: Sequence[str], images_dir: str) -> str:
    """Return lines: what a resolved directory or URL holds, and the nearest names of the first missing images."""
    listing = _list(images_dir)
    return "\n".join([listing.words(), *_nearest_lines(missing, images_dir, listing)])


def describe_outside(outside: Sequence[str], images_dir: str) -> str:
    """Return the same lines of ids that leave the directory, each with a line break before it; none where nothing is near."""
    listing = _list(images_dir)
    lines = _nearest_lines(outside, images_dir, listing)
    if lines or any(map(is_web, outside)):
        lines.insert(0, listing.words())
    return "".join(f"\n{line}" for line in lines)


def _nearest_lines(missing: Sequence[str], images_dir: str, listing: _Listing) -> list[str]:
    lines = []
    for image_id in missing[:_EXPLAINED]:
        if (found := _nearest(image_id, images_dir, listing.names)) is not None:
            lines.append(f"  for {short(image_id)} there is {short(found)}: {_difference(image_id, found)}")
    return lines


@dataclass(frozen=True, slots=True)
class _Listing:
    """The names of files below a directory, relative to it, as far as they were listed."""

    place: str
    names: tuple[str, ...]
    complete: bool

    def words(self) -> str:
        """Say how many there are, of which kinds, and name some."""
        if not self.names:
            return f"{self.place} holds no file" + ("" if self.complete else " among the first that were listed")
        kinds = Counter(PurePosixPath(name).suffix or "without an extension" for name in self.names)
        shown = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(_KINDS))
        more = ", …" if len(kinds) > _KINDS else ""
        number = f"{len(self.names):,}" if self.complete else f"over {len(self.names):,}"
        noun = "file" if len(self.names) == 1 else "files"
        some = ", ".join(short(name) for name in self.names[:_NAMED])
        return f"{self.place} holds {number} {noun} ({shown}{more}), such as {some}"


def _list(images_dir: str) -> _Listing:
    try:
        walk: Iterator[str | None] = iter(some_objects(images_dir, _LISTED + 1)) if is_url(images_dir) else _walk(images_dir)
        entries = list(islice(walk, _LISTED + 1))
    except (OSError, UserError):  # it could be asked for single images a moment ago: then nothing can be said of it
        return _Listing(images_dir, (), complete=False)
    names = sorted(name for name in entries[:_LISTED] if name is not None)
    return _Listing(images_dir, tuple(names), complete=len(entries) <= _LISTED)


def _walk(root: str) -> Iterator[str | None]:
    """Yield the names of files level by level, and None for each directory; no link to one is followed."""
    waiting = [""]
    for below in waiting:  # grows while it is read
        try:
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    name = os.path.join(below, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                        yield None
                    else:
                        yield name
        except OSError:  # one that may not be entered holds nothing for us
            if not below:
                raise


def _nearest(image_id: str, images_dir: str, names: Sequence[str]) -> str | None:
    """Return the name that a missing one may mean: spelled otherwise where it is, or else in what was listed."""
    if not is_url(images_dir):
        for name in _spellings(image_id):
            if name != image_id and _is_file(os.path.join(images_dir, name)):
                return name
    else:
        there = set(names)
        if (found := next((n for n in _spellings(image_id) if n in there and n != image_id), None)) is not None:
            return found
    return _alike(image_id, names)


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # NUL
        return False


def _spellings(image_id: str) -> Iterator[str]:
    """Yield the names that a missing one suggests, the least changed first. None leaves the directory."""
    path = _path(image_id)
    parts = [part for part in path.split("/") if part not in {"", ".", ".."}]
    wholes = dict.fromkeys("/".join(parts[start:]) for start in range(len(parts)))
    wholes |= dict.fromkeys(unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in list(wholes))
    yield from wholes
    for whole in wholes:
        stem, suffix = os.path.splitext(whole)
        for extension in (suffix.lower(), suffix.upper(), *_EXTENSIONS):
            yield stem + extension
            yield whole + extension
    if parts and (match := _LAST_NUMBER.search(os.path.splitext(parts[-1])[0])):
        number = int(match[1][-18:])
        for prefix in _COCO:
            for digits in (f"{number:012d}", str(number)):
                yield from (f"{prefix}{digits}{extension}" for extension in (".jpg", ".png", ".jpeg"))


def _path(image_id: str) -> str:
    """Return an id as a path: without blanks at its ends, back slashes turned, of a URL the path alone."""
    text = image_id.strip().replace("\\", "/")
    return unquote(re.split("[?#]", text.partition("://")[2])[0]) if _URL.match(text) else text


def _alike(image_id: str, names: Iterable[str]) -> str | None:
    """Return the listed name with the same base name, but for case, form, blanks and extension; or with the same number."""
    wanted = _path(image_id).rpartition("/")[2]
    whole, stem, number = _folded(wanted), _folded(os.path.splitext(wanted)[0]), _number(wanted)
    same_stem = same_number = None
    for name in names:
        if name == image_id:  # it is there, and leads elsewhere
            continue
        base = name.rpartition("/")[2]
        if _folded(base) == whole:
            return name
        if same_stem is None and stem in {_folded(os.path.splitext(base)[0]), _folded(base)}:
            same_stem = name
        if same_number is None and number is not None and number == _number(base) and _one_is_bare(wanted, base):
            same_number = name
    return same_stem or same_number


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _number(name: str) -> int | None:
    match = _LAST_NUMBER.search(os.path.splitext(name)[0])
    return int(match[1][-18:]) if match else None


def _one_is_bare(*names: str) -> bool:
    """Tell whether one of some names is a number alone: `dog_1` and `cat_1` are not alike."""
    return any(os.path.splitext(name)[0].strip().isdecimal() for name in names)


def _difference(image_id: str, found: str) -> str:
    """Say what a missing name would have to be changed in."""
    directory, _, wanted = _path(image_id).rpartition("/")
    place, _, base = found.rpartition("/")
    said = []
    if _URL.match(image_id.strip()):
        said.append("the last part of the URL")
    elif "\\" in image_id:
        said.append("the id has back slashes")
    if image_id != image_id.strip():
        said.append("the id has blanks at its ends")
    if place and not f"/{directory}".endswith(f"/{place}"):
        said.append(f"in the directory {short(place + '/')}")
    elif place != directory and not said:
        said.append(f"without {short(f'{directory}/'.removesuffix(f'{place}/' if place else ''))}")
    if base != wanted:
        said.append(_of_names(wanted, base))
    return ", ".join(said) or "spelled otherwise"


def _of_names(wanted: str, base: str) -> str:
    if unicodedata.normalize("NFC", wanted) == unicodedata.normalize("NFC", base):
        form = next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, base)), "another")
        return f"the same letters in another Unicode form ({form})"
    if _folded(wanted) == _folded(base):
        return "other letter case"
    stem, suffix = os.path.splitext(base)
    if _folded(os.path.splitext(wanted)[0]) in {_folded(stem), _folded(base)} or _folded(wanted) == _folded(stem):
        return f"with the extension {suffix}" if suffix else "without an extension"
    return "the same number, called otherwise"
